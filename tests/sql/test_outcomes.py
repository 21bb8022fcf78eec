"""The types of db.py and db_security.py name the outcomes that the SQL functions can have, and no others."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from types import FunctionType, ModuleType

import pytest
import pytest_asyncio

import db
import db_security
from tests.support.sql_client import Client

pytestmark = pytest.mark.asyncio(loop_scope="module")

FUNCTIONS = {
    name: function
    for module in (db, db_security)
    for name, function in inspect.getmembers(module, inspect.iscoroutinefunction)
    if function.__module__ == module.__name__
}
TEXTS = """
select p.proname as name, string_agg(pg_get_functiondef(p.oid), ' ') as text from pg_proc p
where p.pronamespace = 'public'::regnamespace and p.prokind = 'f' group by 1
"""
LITERAL = re.compile(r"'outcome',\s*'(\w+)'")
CASE = re.compile(r"'outcome',\s*case\b(.*?)\bend\b", re.DOTALL)
BRANCH = re.compile(r"(?:then|else)\s+'(\w+)'")
VARIABLE = re.compile(r"'outcome',\s*(\w+)\)?")
# Where the outcome is a variable: what its values look like in the functions that can be reached.
VALUES = {
    "p_code": (r"return '(\w+)'", r"public\.refusal\('(\w+)'"),
    "p_outcome": (r"settlement_answer\([\w.]+, '(\w+)'",),
    "v_outcome": (r"return '(\w+)'", r"(?:then|else) '(\w+)'", r"v_outcome := '(\w+)'"),
}


def sql_function_of(function: FunctionType) -> str | None:
    """The SQL function that a function of db.py calls, None for a query."""
    for node in ast.walk(ast.parse(inspect.getsource(function))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "call":
            name = node.args[1]
            assert isinstance(name, ast.Constant) and isinstance(name.value, str)
            return name.value
    return None


def typed_outcomes(kind: object) -> Iterator[str]:
    """Every outcome in a type: of each member of a union, of the items of a list."""
    row = typing.get_origin(kind) or kind
    if not typing.is_typeddict(row):
        for part in typing.get_args(kind):
            yield from typed_outcomes(part)
        return
    outcome = evaluated(row.__annotations__.get("outcome"), sys.modules[row.__module__])
    if not isinstance(outcome, typing.TypeVar):
        yield from typing.get_args(outcome)
    elif arguments := typing.get_args(kind):
        yield from typing.get_args(arguments[0])
    else:  # it extends a row whose outcomes are given there
        for base in getattr(row, "__orig_bases__", ()):
            yield from typed_outcomes(base)


def evaluated(annotation: object, module: ModuleType) -> object:
    """An annotation that is still text, in the names of its module."""
    text = getattr(annotation, "__forward_arg__", annotation)
    return eval(text, vars(module)) if isinstance(text, str) else text


def reachable(name: str, texts: dict[str, str]) -> str:
    """The text of a function and of all that it calls."""
    seen: dict[str, str] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name not in seen and name in texts:
            seen[name] = texts[name]
            waiting += re.findall(r"public\.(\w+)\(", texts[name])
    return " ".join(seen.values())


def sql_outcomes(text: str) -> set[str]:
    """Every outcome in the text of SQL functions."""
    found = set(LITERAL.findall(text))
    for branches in CASE.findall(text):
        found |= set(BRANCH.findall(branches))
    for variable in set(VARIABLE.findall(text)) - {"case"}:
        for pattern in VALUES[variable]:
            found |= set(re.findall(pattern, text))
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def texts(client_18: Client) -> dict[str, str]:
    return {row["name"]: row["text"] for row in await client_18.rows(TEXTS)}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if sql_function_of(FUNCTIONS[name])])
async def test_the_types_name_every_outcome_and_no_other(name: str, texts: dict[str, str]) -> None:
    function = FUNCTIONS[name]
    sql_name = sql_function_of(function)
    assert sql_name in texts
    kind = eval(function.__annotations__["return"], function.__globals__)
    assert set(typed_outcomes(kind)) == sql_outcomes(reachable(sql_name, texts))


async def test_an_outcome_is_found_wherever_it_is_written() -> None:
    assert sql_outcomes("jsonb_build_object('outcome', 'set', 'user_id', 1)") == {"set"}
    assert sql_outcomes("('outcome', case when a then 'b' else 'c' end, 'd', 'e')") == {"b", "c"}
    text = "jsonb_build_object('outcome', p_code) ... return 'GONE'; ... public.refusal('SPENT', p_item)"
    assert sql_outcomes(text) == {"GONE", "SPENT"}
    with pytest.raises(KeyError, match="v_new"):
        sql_outcomes("jsonb_build_object('outcome', v_new)")
