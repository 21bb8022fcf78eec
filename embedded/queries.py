"""A PostgREST request's parameters and headers, read once. What is unknown here is refused.

https://docs.postgrest.org/en/v14/references/api/tables_views.html and .../api/preferences.html
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import httpx

from .catalog import SCHEMA
from .filters import OPERATORS, split_outside_quotes, unquoted
from .postgrest_errors import PostgrestError, bad_request, not_implemented, range_not_satisfiable

PLAIN_MEDIA = {"*/*", "application/*", "application/json", "application/vnd.pgrst.array+json"}
SINGLE_MEDIA = {"application/vnd.pgrst.object+json", "application/vnd.pgrst.object"}
# An unknown preference would change the result of a hosted project, so it is refused instead of ignored.
KNOWN_PREFERENCES = {
    "return": {"minimal", "representation"},
    "resolution": {"merge-duplicates", "ignore-duplicates"},
    "missing": {"default", "null"},
    "count": {"exact"},
    "handling": {"strict", "lenient"},
    "tx": {"commit"},
}
CLAUSES = {"select", "order", "limit", "offset", "columns", "on_conflict"}
LOGIC = {"and", "or", "not.and", "not.or"}


@dataclass(frozen=True)
class Preferences:
    """What the Prefer header says."""

    returns: str = "minimal"
    resolution: str | None = None
    missing_is_default: bool = False
    count: bool = False
    max_affected: int | None = None


@dataclass(frozen=True)
class Query:
    """One request, apart from its method, target and body."""

    select: str = "*"
    order: str = ""
    filters: tuple[tuple[str, str], ...] = ()
    offset: int = 0
    limit: int | None = None
    columns: tuple[str, ...] | None = None
    on_conflict: tuple[str, ...] = ()
    is_single: bool = False
    strips_nulls: bool = False
    preferences: Preferences = field(default_factory=Preferences)


PLAIN_QUERY = Query()


def read_query(request: httpx.Request, parameters: Iterable[tuple[str, str]]) -> Query:
    """The query of a request. Raises PostgrestError for what is malformed or not implemented."""
    clauses, filters = _split_clauses(parameters)
    is_single, strips_nulls = _read_accept(request.headers.get("accept", "*/*"))
    offset, limit = _read_range(clauses, request.headers)
    return Query(
        select=clauses.get("select", "*"),
        order=clauses.get("order", ""),
        filters=tuple(filters),
        offset=offset,
        limit=limit,
        columns=_names(clauses["columns"]) if clauses.get("columns") else None,
        on_conflict=_names(clauses.get("on_conflict", "")),
        is_single=is_single,
        strips_nulls=strips_nulls,
        preferences=_read_preferences(request.headers.get("prefer", "")),
    )


def check_schema(headers: httpx.Headers) -> None:
    """Raises PostgrestError unless the profile is the exposed schema."""
    for name in ("accept-profile", "content-profile"):
        if headers.get(name, SCHEMA) != SCHEMA:
            message = f"Invalid schema: {headers[name]}"
            raise PostgrestError(406, "PGRST106", message, hint=f"Only {SCHEMA} is exposed")


def read_parameters(query: str) -> list[tuple[str, str]]:
    """The pairs of name and value in a query string."""
    return urllib.parse.parse_qsl(query, keep_blank_values=True) if query else []


def split_arguments(parameters: Iterable[tuple[str, str]]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The arguments of a function that is called by GET, and the other parameters.

    A value that begins with an operator is a filter of the result, not an argument.
    """
    arguments: dict[str, str] = {}
    others: list[tuple[str, str]] = []
    for name, value in parameters:
        if name in CLAUSES | LOGIC or "." in name or _is_operation(value):
            others.append((name, value))
        elif name in arguments:
            raise not_implemented(f"Repeating the argument {name}")
        else:
            arguments[name] = value
    return arguments, others


def _split_clauses(parameters: Iterable[tuple[str, str]]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    clauses: dict[str, str] = {}
    filters: list[tuple[str, str]] = []
    for name, value in parameters:
        if name in CLAUSES:
            clauses[name] = value
        elif name.endswith((".order", ".limit", ".offset", ".select")):
            raise not_implemented(f"The parameter {name} of an embedded resource")
        else:
            # The same column may be filtered twice, such as age=gte.18&age=lt.65.
            filters.append((name, value))
    return clauses, filters


def _is_operation(value: str) -> bool:
    operator, dot, _ = value.removeprefix("not.").partition(".")
    return bool(dot) and operator.partition("(")[0] in OPERATORS


def _names(text: str) -> tuple[str, ...]:
    """The column names of a list, each once: PostgreSQL refuses a column that is named twice."""
    return tuple(dict.fromkeys(unquoted(name.strip()) for name in split_outside_quotes(text)))


def _read_accept(accept: str) -> tuple[bool, bool]:
    """Whether the client wants a single object, and whether nulls are left out."""
    media, *options = [part.strip() for part in accept.split(",")[0].split(";")]
    if media not in SINGLE_MEDIA | PLAIN_MEDIA:
        raise not_implemented(f"The media type {media}")
    return media in SINGLE_MEDIA, "nulls=stripped" in options


def _read_range(clauses: Mapping[str, str], headers: httpx.Headers) -> tuple[int, int | None]:
    """The offset and the limit: of the query string, narrowed by the Range header."""
    offset = _integer(clauses.get("offset", "0"), "offset")
    limit = _integer(clauses["limit"], "limit") if "limit" in clauses else None
    if limit is not None and limit < 0:
        raise range_not_satisfiable("Limit should be greater than or equal to zero.")
    if "range" in headers:
        offset, limit = _narrow(offset, limit, headers["range"])
    return max(offset, 0), limit


def _narrow(offset: int, limit: int | None, header: str) -> tuple[int, int | None]:
    first, _, last = header.removeprefix("items=").partition("-")
    offset = max(offset, _integer(first, "range"))
    if not last:
        return offset, limit
    within = _integer(last, "range") - offset + 1
    limit = within if limit is None else min(limit, within)
    if limit < 0:
        raise range_not_satisfiable(
            "The lower boundary must be lower than or equal to the upper boundary in the Range header."
        )
    return offset, limit


def _integer(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise bad_request("PGRST100", f'"failed to parse {name} ({text})"') from None


def _read_preferences(header: str) -> Preferences:
    values = dict(map(_read_preference, filter(None, (part.strip() for part in header.split(",")))))
    # PostgREST ignores max-affected unless the handling is strict.
    is_limited = "max-affected" in values and values.get("handling") == "strict"
    return Preferences(
        returns=values.get("return", "minimal"),
        resolution=values.get("resolution"),
        missing_is_default=values.get("missing") == "default",
        count=values.get("count") == "exact",
        max_affected=_integer(values["max-affected"], "max-affected") if is_limited else None,
    )


def _read_preference(preference: str) -> tuple[str, str]:
    name, _, value = preference.partition("=")
    known = KNOWN_PREFERENCES.get(name)
    if name != "max-affected" and (known is None or value not in known):
        raise not_implemented(f"The preference {preference}")
    return name, value
