"""The statement that answers a request.

Each statement returns one row: the JSON text, how many rows it holds, and the total if it was counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import orjson

from .answers import Refusal, bad_request, not_implemented
from .catalog import Column, Function, Relation, quote_identifier
from .filters import Arguments, Source
from .queries import Query

SOURCE = "pgrst_source"
PAGE = "pgrst_page"
BODY = "pgrst_body"


@dataclass(frozen=True)
class Statement:
    """SQL and its parameters."""

    sql: str
    arguments: Sequence[object] = ()


def read_statement(relation: Relation, query: Query, max_rows: int) -> Statement:
    """GET and HEAD of a table."""
    arguments = Arguments()
    source = Source(relation, relation.sql, arguments)
    selection = source.selection(query.select)
    where = _where(source, query)
    page = f"select {selection} from {relation.sql}{where}{_order(source, query)}{_slice(query, max_rows)}"
    total = f"(select count(*) from {relation.sql}{where})" if query.preferences.count else "null::bigint"
    return Statement(f"with {PAGE} as ({page}) {_answer(query, total)}", arguments.values)


def insert_statement(relation: Relation, query: Query, body: bytes) -> Statement:
    """POST to a table, with or without ON CONFLICT."""
    rows = _rows(body)
    names = query.columns if query.columns is not None else _common_keys(rows)
    columns = [_writable(relation, name) for name in names]
    arguments = Arguments([body.decode()])
    target = f"({', '.join(quote_identifier(c.name) for c in columns)}) " if columns else ""
    values = ", ".join(f"{BODY}.{quote_identifier(c.name)}" for c in columns)
    source = _json_rows(columns, body, with_defaults=query.preferences.missing_is_default)
    sql = f"insert into {relation.sql} {target}select {values} from {source}{_on_conflict(relation, query, columns)}"
    return _changed(relation, query, sql, arguments)


def update_statement(relation: Relation, query: Query, body: bytes) -> Statement:
    """PATCH of the rows that the filters choose."""
    rows = _rows(body)
    if len(rows) != 1:
        raise not_implemented("Updating with other than one object")
    names = query.columns if query.columns is not None else _common_keys(rows)
    columns = [_writable(relation, name) for name in names]
    arguments = Arguments([body.decode()])
    if not columns:
        return _changed(
            relation, query, f"select * from {relation.sql} where $1::text is null", arguments, is_read=True
        )
    source = Source(relation, relation.sql, arguments)
    values = ", ".join(f"{quote_identifier(c.name)} = {BODY}.{quote_identifier(c.name)}" for c in columns)
    rows_sql = _json_rows(columns, body, with_defaults=query.preferences.missing_is_default)
    where = _required_where(source, query, "UPDATE")
    return _changed(relation, query, f"update {relation.sql} set {values} from {rows_sql}{where}", arguments)


def delete_statement(relation: Relation, query: Query) -> Statement:
    """DELETE of the rows that the filters choose."""
    arguments = Arguments()
    where = _required_where(Source(relation, relation.sql, arguments), query, "DELETE")
    return _changed(relation, query, f"delete from {relation.sql}{where}", arguments)


def call_statement(
    function: Function, names: Sequence[str], query: Query, max_rows: int, body: str | None
) -> Statement:
    """A call with these named arguments, which are in the JSON object `body`; or `body` is the one unnamed
    argument.
    """
    arguments = Arguments([] if body is None else [body])
    call, source = _call(function, names, has_body=body is not None)
    if function.rows is None and not function.is_set:
        if query.filters or query.order:
            raise not_implemented("Filtering the result of a function that returns a single value")
        return Statement(
            f"select {_scalar_text(function, call)}, 1::bigint, null::bigint{source}", arguments.values
        )
    rows = function.rows or Relation(
        function.name, {"pgrst_scalar": Column("pgrst_scalar", function.return_type)}
    )
    called = f"select pgrst_call.*{source}{', lateral' if source else ' from'} {call} as pgrst_call"
    if function.rows is None:
        called += "(pgrst_scalar)"
        query = replace(query, select="*")
    reading = Source(rows, SOURCE, arguments)
    selection, where = reading.selection(query.select), _where(reading, query)
    page = f"select {selection} from {SOURCE}{where}{_order(reading, query)}{_slice(query, max_rows)}"
    total = f"(select count(*) from {SOURCE}{where})" if query.preferences.count else "null::bigint"
    element = f"{PAGE}.pgrst_scalar" if function.rows is None else PAGE
    answer = _answer(query, total, element=element, first=not function.is_set)
    return Statement(f"with {SOURCE} as ({called}), {PAGE} as ({page}) {answer}", arguments.values)


def _call(function: Function, names: Sequence[str], *, has_body: bool) -> tuple[str, str]:
    """The call itself, and the FROM clause that unfolds its arguments."""
    if not has_body:
        return f"{function.sql}()", ""
    if function.takes_whole_body:
        return f"{function.sql}($1::{function.arguments[0].type})", ""
    columns = [function.by_name[name] for name in names]
    given = ", ".join(f"{quote_identifier(c.name)} => pgrst_args.{quote_identifier(c.name)}" for c in columns)
    return (
        f"{function.sql}({given})",
        f" from json_to_record($1::json) as pgrst_args({_definitions(columns)})",
    )


def _scalar_text(function: Function, call: str) -> str:
    if function.return_type == "void":
        return f"{call}::text"
    return (
        f"coalesce({call}::text, 'null')"
        if function.return_type in ("json", "jsonb")
        else f"coalesce(to_json({call})::text, 'null')"
    )


def _answer(query: Query, total: str, *, element: str = PAGE, first: bool = False) -> str:
    rows = f"json_agg({element})"
    if query.strips_nulls:
        rows = f"json_strip_nulls({rows})"
    is_object = first or query.is_single
    body = f"coalesce(({rows}->0)::text, 'null')" if is_object else f"coalesce({rows}::text, '[]')"
    return f"select {body}, count(*), {total} from {PAGE}"


def _changed(
    relation: Relation, query: Query, sql: str, arguments: Arguments, *, is_read: bool = False
) -> Statement:
    """A change as a statement that answers with its rows, or only with their number."""
    if query.preferences.returns == "minimal" and not query.is_single:
        returning = "" if is_read else " returning 1"
        return Statement(
            f"with {SOURCE} as ({sql}{returning}) select '', count(*), count(*) from {SOURCE}",
            arguments.values,
        )
    returning = "" if is_read else f" returning {relation.sql}.*"
    reading = Source(relation, SOURCE, arguments)
    page = f"select {reading.selection(query.select)} from {SOURCE}{_order(reading, query)}"
    counted = f"(select count(*) from {SOURCE})"
    return Statement(
        f"with {SOURCE} as ({sql}{returning}), {PAGE} as ({page}) {_answer(query, counted)}", arguments.values
    )


def _on_conflict(relation: Relation, query: Query, columns: Sequence[Column]) -> str:
    if query.preferences.resolution is None:
        return ""
    keys = query.on_conflict or relation.primary_key
    if not keys:
        return ""
    target = ", ".join(quote_identifier(relation_column(relation, name).name) for name in keys)
    if query.preferences.resolution == "ignore-duplicates" or not columns:
        return f" on conflict ({target}) do nothing"
    updates = ", ".join(f"{quote_identifier(c.name)} = excluded.{quote_identifier(c.name)}" for c in columns)
    return f" on conflict ({target}) do update set {updates}"


def _json_rows(columns: Sequence[Column], body: bytes, *, with_defaults: bool) -> str:
    """The JSON of $1 as rows with these columns, missing keys being null, or the columns' defaults."""
    array = "$1::text::json" if body.lstrip().startswith(b"[") else "json_build_array($1::text::json)"
    if not columns:
        return f"json_array_elements({array}) as {BODY}"
    if not with_defaults:
        return f"json_to_recordset({array}) as {BODY}({_definitions(columns)})"
    defaults = ", ".join(
        f"{_literal(column.name)}, {column.default}" for column in columns if column.default is not None
    )
    filled = f"select jsonb_build_object({defaults}) || element from jsonb_array_elements(({array})::jsonb) as element"
    return f"({filled}) as pgrst_filled(row), lateral jsonb_to_record(pgrst_filled.row) as {BODY}({_definitions(columns)})"


def _definitions(columns: Sequence[Column]) -> str:
    return ", ".join(f"{quote_identifier(column.name)} {column.type}" for column in columns)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def relation_column(relation: Relation, name: str) -> Column:
    """The column that a key of ON CONFLICT names. Raises Refusal as PostgreSQL does where there is none."""
    if name not in relation.columns:
        raise Refusal(400, "42703", f'column "{name}" does not exist')
    return relation.columns[name]


def _writable(relation: Relation, name: str) -> Column:
    if name not in relation.columns:
        message = f"Could not find the '{name}' column of '{relation.name}' in the schema cache"
        raise bad_request("PGRST204", message)
    return relation.columns[name]


def _rows(body: bytes) -> list[dict[str, object]]:
    """The objects of a body. Raises Refusal for what is no JSON object or array of objects."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise bad_request("PGRST102", "Empty or invalid json") from exc
    rows = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(row, dict) for row in rows):
        raise bad_request("PGRST102", "The body must be a JSON object or an array of objects")
    return rows


def _common_keys(rows: list[dict[str, object]]) -> tuple[str, ...]:
    if any(row.keys() != rows[0].keys() for row in rows):
        raise bad_request("PGRST102", "All object keys must match")
    return tuple(rows[0]) if rows else ()


def _where(source: Source, query: Query) -> str:
    conditions = [source.condition(name, text) for name, text in query.filters]
    return f" where {' and '.join(conditions)}" if conditions else ""


def _required_where(source: Source, query: Query, verb: str) -> str:
    """The WHERE clause, without which a hosted Supabase changes nothing (its extension safeupdate)."""
    if not query.filters:
        raise bad_request("21000", f"{verb} requires a WHERE clause")
    return _where(source, query)


def _order(source: Source, query: Query) -> str:
    return f" order by {source.order(query.order)}" if query.order else ""


def _slice(query: Query, max_rows: int) -> str:
    """The page's LIMIT and OFFSET: integers that were read as such."""
    limit = max_rows if query.limit is None else min(query.limit, max_rows)
    return f" limit {limit}" + (f" offset {query.offset}" if query.offset else "")
