"""The SQL statement that answers a request.

Each statement returns one row: the JSON text, how many rows it holds, and the total if it was counted. Names
come from the catalog and are quoted; a value must never become part of the SQL text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import orjson

from .catalog import Column, Function, Relation, quote_identifier
from .filters import Arguments, Source
from .postgrest_errors import PostgrestError, bad_request, not_implemented
from .queries import Query

# Names inside a statement. The prefix keeps them apart from the tables of the exposed schema.
SOURCE = "pgrst_source"
PAGE = "pgrst_page"
BODY = "pgrst_body"
ARGUMENTS = "pgrst_args"


@dataclass(frozen=True)
class Statement:
    """SQL and its parameters."""

    sql: str
    arguments: Sequence[object] = ()


def read_statement(relation: Relation, query: Query, max_rows: int) -> Statement:
    """The statement of GET and HEAD of a table."""
    arguments = Arguments()
    source = Source(relation, relation.sql, arguments)
    page, total = _page(source, query, max_rows)
    return Statement(f"with {PAGE} as ({page}) {_result(query, total)}", arguments.values)


def insert_statement(relation: Relation, query: Query, body: bytes) -> Statement:
    """The statement of POST to a table, with or without ON CONFLICT."""
    columns = _written_columns(relation, query, _read_rows(body))
    target = f"({_quoted_list(columns)}) " if columns else ""
    values = ", ".join(f"{BODY}.{quote_identifier(c.name)}" for c in columns)
    rows = _json_rows(columns, body, with_defaults=query.preferences.missing_is_default)
    conflict = _on_conflict(relation, query, columns)
    insert = f"insert into {relation.sql} {target}select {values} from {rows}{conflict}"
    return _change(relation, query, insert, Arguments([body.decode()]))


def update_statement(relation: Relation, query: Query, body: bytes) -> Statement:
    """The statement of PATCH of the rows that the filters choose."""
    rows = _read_rows(body)
    if len(rows) != 1:
        raise not_implemented("Updating with other than one object")
    columns = _written_columns(relation, query, rows)
    arguments = Arguments([body.decode()])
    if not columns:
        # An empty object changes nothing. The condition uses the parameter, whose type would be unknown
        # otherwise.
        nothing = f"select * from {relation.sql} where $1::text is null"
        return _change(relation, query, nothing, arguments, is_read=True)
    values = _pairs(columns, "=", BODY)
    new_row = _json_rows(columns, body, with_defaults=query.preferences.missing_is_default)
    where = _required_where(Source(relation, relation.sql, arguments), query, "UPDATE")
    return _change(relation, query, f"update {relation.sql} set {values} from {new_row}{where}", arguments)


def delete_statement(relation: Relation, query: Query) -> Statement:
    """The statement of DELETE of the rows that the filters choose."""
    arguments = Arguments()
    where = _required_where(Source(relation, relation.sql, arguments), query, "DELETE")
    return _change(relation, query, f"delete from {relation.sql}{where}", arguments)


def call_statement(
    function: Function, names: Sequence[str], query: Query, max_rows: int, body: str | None
) -> Statement:
    """The statement of a call.

    `body` is a JSON object with the arguments in `names`, or the one unnamed argument as a whole.
    """
    arguments = Arguments([] if body is None else [body])
    call, unfolded = _call(function, names, has_body=body is not None)
    if function.rows is None and not function.is_set:
        return _scalar_statement(function, query, call, unfolded, arguments)
    called = f"select pgrst_call.*{unfolded}{', lateral' if unfolded else ' from'} {call} as pgrst_call"
    rows, element = function.rows, PAGE
    if rows is None:
        # A set of scalars becomes rows with one column, so that it can be cut into pages like any other rows.
        rows = Relation(function.name, {"pgrst_scalar": Column("pgrst_scalar", function.return_type)})
        called, element, query = f"{called}(pgrst_scalar)", f"{PAGE}.pgrst_scalar", replace(query, select="*")
    page, total = _page(Source(rows, SOURCE, arguments), query, max_rows)
    result = _result(query, total, element=element, first=not function.is_set)
    return Statement(f"with {SOURCE} as ({called}), {PAGE} as ({page}) {result}", arguments.values)


def _scalar_statement(
    function: Function, query: Query, call: str, unfolded: str, arguments: Arguments
) -> Statement:
    if query.filters or query.order:
        raise not_implemented("Filtering the result of a function that returns a single value")
    scalar = _scalar_text(function, call)
    return Statement(f"select {scalar}, 1::bigint, null::bigint{unfolded}", arguments.values)


def _call(function: Function, names: Sequence[str], *, has_body: bool) -> tuple[str, str]:
    """The call itself, and the FROM clause that unfolds its arguments from the JSON parameter."""
    if not has_body:
        return f"{function.sql}()", ""
    if function.takes_whole_body:
        return f"{function.sql}($1::{function.arguments[0].type})", ""
    columns = [function.by_name[name] for name in names]
    named = _pairs(columns, "=>", ARGUMENTS)
    unfolded = f" from json_to_record($1::json) as {ARGUMENTS}({_definitions(columns)})"
    return f"{function.sql}({named})", unfolded


def _scalar_text(function: Function, call: str) -> str:
    """The result as JSON text. A result that is JSON already must not be quoted once more."""
    if function.return_type == "void":
        return f"{call}::text"
    if function.return_type in ("json", "jsonb"):
        return f"coalesce({call}::text, 'null')"
    return f"coalesce(to_json({call})::text, 'null')"


def _page(source: Source, query: Query, max_rows: int) -> tuple[str, str]:
    """The SELECT of the wanted rows, and the SQL of their total number over all pages."""
    # The order matters: each call binds its parameters, which are numbered as they come.
    selection, where = source.selection(query.select), _where(source, query)
    page = f"select {selection} from {source.alias}{where}{_order(source, query)}{_slice(query, max_rows)}"
    total = f"(select count(*) from {source.alias}{where})" if query.preferences.count else "null::bigint"
    return page, total


def _result(query: Query, total: str, *, element: str = PAGE, first: bool = False) -> str:
    """The SELECT of the one row that every statement returns; `first` takes the only element of the array."""
    rows = f"json_agg({element})"
    if query.strips_nulls:
        rows = f"json_strip_nulls({rows})"
    is_object = first or query.is_single
    body = f"coalesce(({rows}->0)::text, 'null')" if is_object else f"coalesce({rows}::text, '[]')"
    return f"select {body}, count(*), {total} from {PAGE}"


def _change(
    relation: Relation, query: Query, sql: str, arguments: Arguments, *, is_read: bool = False
) -> Statement:
    """A change as a statement that returns its rows, or only their number."""
    if query.preferences.returns == "minimal" and not query.is_single:
        changed = sql if is_read else f"{sql} returning 1"
        counted = f"select '', count(*), count(*) from {SOURCE}"
        return Statement(f"with {SOURCE} as ({changed}) {counted}", arguments.values)
    changed = sql if is_read else f"{sql} returning {relation.sql}.*"
    source = Source(relation, SOURCE, arguments)
    page = f"select {source.selection(query.select)} from {SOURCE}{_order(source, query)}"
    result = _result(query, f"(select count(*) from {SOURCE})")
    return Statement(f"with {SOURCE} as ({changed}), {PAGE} as ({page}) {result}", arguments.values)


def _on_conflict(relation: Relation, query: Query, columns: Sequence[Column]) -> str:
    keys = query.on_conflict or relation.primary_key
    if query.preferences.resolution is None or not keys:
        return ""
    target = _quoted_list([_conflict_column(relation, name) for name in keys])
    if query.preferences.resolution == "ignore-duplicates" or not columns:
        return f" on conflict ({target}) do nothing"
    return f" on conflict ({target}) do update set {_pairs(columns, '=', 'excluded')}"


def _json_rows(columns: Sequence[Column], body: bytes, *, with_defaults: bool) -> str:
    """The JSON of $1 as rows with these columns. A missing key is null, or the column's default."""
    array = "$1::text::json" if body.lstrip().startswith(b"[") else "json_build_array($1::text::json)"
    if not columns:
        return f"json_array_elements({array}) as {BODY}"
    definitions = _definitions(columns)
    if not with_defaults:
        return f"json_to_recordset({array}) as {BODY}({definitions})"
    # Each object is laid over an object of the defaults, so that a default is used only where its key is
    # missing.
    pairs = [f"{_literal(column.name)}, {column.default}" for column in columns if column.default is not None]
    elements = f"jsonb_array_elements(({array})::jsonb) as element"
    filled = (
        f"(select jsonb_build_object({', '.join(pairs)}) || element from {elements}) as pgrst_filled(row)"
    )
    return f"{filled}, lateral jsonb_to_record(pgrst_filled.row) as {BODY}({definitions})"


def _pairs(columns: Sequence[Column], operator: str, source: str) -> str:
    """Assignments of columns, or arguments by name, from the fields of `source`."""
    names = [quote_identifier(column.name) for column in columns]
    return ", ".join(f"{name} {operator} {source}.{name}" for name in names)


def _quoted_list(columns: Sequence[Column]) -> str:
    return ", ".join(quote_identifier(column.name) for column in columns)


def _definitions(columns: Sequence[Column]) -> str:
    return ", ".join(f"{quote_identifier(column.name)} {column.type}" for column in columns)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _conflict_column(relation: Relation, name: str) -> Column:
    """The column that a key of ON CONFLICT names. Raises PostgrestError as PostgreSQL does."""
    if name not in relation.columns:
        raise PostgrestError(400, "42703", f'column "{name}" does not exist')
    return relation.columns[name]


def _written_columns(relation: Relation, query: Query, rows: list[dict[str, object]]) -> list[Column]:
    """The columns that a body fills: those of `columns=`, else the keys of its objects."""
    names = query.columns if query.columns is not None else _common_keys(rows)
    return [_writable(relation, name) for name in names]


def _writable(relation: Relation, name: str) -> Column:
    if name not in relation.columns:
        message = f"Could not find the '{name}' column of '{relation.name}' in the schema cache"
        raise bad_request("PGRST204", message)
    return relation.columns[name]


def _read_rows(body: bytes) -> list[dict[str, object]]:
    """The objects of a body. Raises PostgrestError unless it is a JSON object or an array of objects."""
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
    """The WHERE clause. A hosted Supabase refuses a change without one (its extension safeupdate)."""
    if not query.filters:
        raise bad_request("21000", f"{verb} requires a WHERE clause")
    return _where(source, query)


def _order(source: Source, query: Query) -> str:
    return f" order by {source.order(query.order)}" if query.order else ""


def _slice(query: Query, max_rows: int) -> str:
    """The page's LIMIT and OFFSET. They were read as integers, so they may be part of the SQL."""
    limit = max_rows if query.limit is None else min(query.limit, max_rows)
    return f" limit {limit}" + (f" offset {query.offset}" if query.offset else "")
