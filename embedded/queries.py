"""A PostgREST request, read once. Its parameters and headers, read once; what is unknown here is refused."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import httpx

from .answers import Refusal, bad_request, not_implemented
from .catalog import SCHEMA
from .filters import OPERATORS, split_outside_quotes, unquoted

PLAIN_MEDIA = {"*/*", "application/*", "application/json", "application/vnd.pgrst.array+json"}
SINGLE_MEDIA = {"application/vnd.pgrst.object+json", "application/vnd.pgrst.object"}
KNOWN_PREFERENCES = {
    "return": {"minimal", "representation"},
    "resolution": {"merge-duplicates", "ignore-duplicates"},
    "missing": {"default", "null"},
    "count": {"exact"},
    "handling": {"strict", "lenient"},
    "tx": {"commit"},
}


@dataclass(frozen=True)
class Preferences:
    """The Prefer header."""

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
    """The query of a request. Raises Refusal for what is malformed or not implemented."""
    given: dict[str, str] = {}
    filters: list[tuple[str, str]] = []
    for name, value in parameters:
        if name in ("select", "order", "limit", "offset", "columns", "on_conflict"):
            given[name] = value
        elif name.endswith((".order", ".limit", ".offset", ".select")):
            raise not_implemented(f"The parameter {name} of an embedded resource")
        else:
            filters.append((name, value))
    is_single, strips_nulls = _read_accept(request.headers.get("accept", "*/*"))
    offset, limit = _read_range(given, request.headers)
    return Query(
        select=given.get("select", "*"),
        order=given.get("order", ""),
        filters=tuple(filters),
        offset=offset,
        limit=limit,
        columns=_names(given["columns"]) if given.get("columns") else None,
        on_conflict=_names(given.get("on_conflict", "")),
        is_single=is_single,
        strips_nulls=strips_nulls,
        preferences=_read_preferences(request.headers.get("prefer", "")),
    )


def check_schema(headers: httpx.Headers) -> None:
    """Raises Refusal unless the profile is the exposed schema."""
    for name in ("accept-profile", "content-profile"):
        if headers.get(name, SCHEMA) != SCHEMA:
            raise Refusal(
                406, "PGRST106", f"Invalid schema: {headers[name]}", hint=f"Only {SCHEMA} is exposed"
            )


def read_parameters(query: str) -> list[tuple[str, str]]:
    """The name and value pairs of a query string."""
    return urllib.parse.parse_qsl(query, keep_blank_values=True) if query else []


def split_arguments(parameters: Iterable[tuple[str, str]]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The arguments of a function called by GET, and the rest: what begins with an operator is a filter."""
    arguments: dict[str, str] = {}
    others: list[tuple[str, str]] = []
    reserved = {
        "select",
        "order",
        "limit",
        "offset",
        "columns",
        "on_conflict",
        "and",
        "or",
        "not.and",
        "not.or",
    }
    for name, value in parameters:
        if name in reserved or "." in name or _is_operation(value):
            others.append((name, value))
        elif name in arguments:
            raise not_implemented(f"Repeating the argument {name}")
        else:
            arguments[name] = value
    return arguments, others


def _is_operation(value: str) -> bool:
    operator, dot, _ = value.removeprefix("not.").partition(".")
    return bool(dot) and operator.partition("(")[0] in OPERATORS


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(unquoted(name.strip()) for name in split_outside_quotes(text)))


def _read_accept(accept: str) -> tuple[bool, bool]:
    media, *options = [part.strip() for part in accept.split(",")[0].split(";")]
    strips_nulls = "nulls=stripped" in options
    if media in SINGLE_MEDIA:
        return True, strips_nulls
    if media in PLAIN_MEDIA:
        return False, strips_nulls
    raise not_implemented(f"The media type {media}")


def _read_range(given: Mapping[str, str], headers: httpx.Headers) -> tuple[int, int | None]:
    offset, limit = _integer(given.get("offset", "0"), "offset"), None
    if "limit" in given:
        limit = _integer(given["limit"], "limit")
        if limit < 0:
            raise Refusal(
                416,
                "PGRST103",
                "Requested range not satisfiable",
                details="Limit should be greater than or equal to zero.",
            )
    if "range" in headers:
        first, _, last = headers["range"].removeprefix("items=").partition("-")
        offset = max(offset, _integer(first, "range"))
        if last:
            within = _integer(last, "range") - offset + 1
            limit = within if limit is None else min(limit, within)
            if limit < 0:
                raise Refusal(
                    416,
                    "PGRST103",
                    "Requested range not satisfiable",
                    details="The lower boundary must be lower than or equal to the upper boundary in the Range header.",
                )
    return max(offset, 0), limit


def _integer(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise bad_request("PGRST100", f'"failed to parse {name} ({text})"') from None


def _read_preferences(header: str) -> Preferences:
    given: dict[str, str] = {}
    for preference in filter(None, (part.strip() for part in header.split(","))):
        name, _, value = preference.partition("=")
        known = KNOWN_PREFERENCES.get(name)
        if name != "max-affected" and (known is None or value not in known):
            raise not_implemented(f"The preference {preference}")
        given[name] = value
    limited = "max-affected" in given and given.get("handling") == "strict"
    return Preferences(
        returns=given.get("return", "minimal"),
        resolution=given.get("resolution"),
        missing_is_default=given.get("missing") == "default",
        count=given.get("count") == "exact",
        max_affected=_integer(given["max-affected"], "max-affected") if limited else None,
    )
