"""The tables, columns and functions of the exposed schema.

They are read from PostgreSQL once, and again when a request names something that is not among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from .asyncpg_types import PooledConnection

SCHEMA = "public"

# Every relation with its columns, as one JSON object. Two choices are not obvious:
# - Without the type modifier -1, format_type writes "character" for bpchar. A cast would then read char(1),
#   and truncate the value.
# - A domain counts as its base type, because PostgREST compares and casts values of the base type.
RELATIONS = """
select coalesce(json_object_agg(c.relname, json_build_object(
    'kind', c.relkind,
    'columns', (
        select json_agg(json_build_object(
            'name', a.attname,
            'type', pg_catalog.format_type(coalesce(nullif(t.typbasetype, 0), a.atttypid), -1),
            'is_array', t.typcategory = 'A',
            'default', case
                when a.attidentity <> '' then
                    format('nextval(%L)', pg_catalog.pg_get_serial_sequence(c.oid::regclass::text, a.attname))
                when a.attgenerated = '' then pg_catalog.pg_get_expr(d.adbin, d.adrelid)
            end
        ) order by a.attnum)
        from pg_catalog.pg_attribute a
        join pg_catalog.pg_type t on t.oid = a.atttypid
        left join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    ),
    'primary_key', (
        select json_agg(a.attname order by k.ordinality)
        from pg_catalog.pg_index i
        cross join lateral unnest(i.indkey) with ordinality as k (attnum, ordinality)
        join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
        where i.indrelid = c.oid and i.indisprimary
    )
)), '{}')::text
from pg_catalog.pg_class c
where c.relnamespace = (select oid from pg_catalog.pg_namespace where nspname = $1)
    and c.relkind in ('r', 'p', 'v', 'm', 'f', 'c')
"""

# Every function that a request can call, as one JSON array. Trigger functions cannot be called, and
# procedures and aggregates (another prokind) are not exposed.
FUNCTIONS = """
select coalesce(json_agg(json_build_object(
    'name', p.proname,
    'is_set', p.proretset,
    'variadic', p.provariadic <> 0,
    'return_type', pg_catalog.format_type(p.prorettype, -1),
    'is_composite', t.typtype = 'c' or coalesce(p.proargmodes::text[] && '{t,b,o}', false),
    'relation', case when c.relnamespace = n.oid then c.relname end,
    'arguments', (
        select json_agg(json_build_object(
            'name', coalesce(p.proargnames[a.ordinality], ''),
            'mode', coalesce(p.proargmodes[a.ordinality], 'i'),
            'type', pg_catalog.format_type(a.type, -1),
            'is_array', (select typcategory = 'A' from pg_catalog.pg_type where oid = a.type)
        ) order by a.ordinality)
        from unnest(coalesce(p.proallargtypes, p.proargtypes::oid[])) with ordinality as a (type, ordinality)
    ),
    'defaults', p.pronargdefaults
)), '[]')::text
from pg_catalog.pg_proc p
join pg_catalog.pg_namespace n on n.oid = p.pronamespace
join pg_catalog.pg_type t on t.oid = p.prorettype
left join pg_catalog.pg_class c on c.oid = t.typrelid
where n.nspname = $1 and p.prokind = 'f' and t.typname not in ('trigger', 'event_trigger')
"""


def quote_identifier(name: str) -> str:
    """The name as SQL that can be nothing but a name."""
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True)
class Column:
    """A column or an argument. `type` is SQL, and `default` is the SQL of its default value."""

    name: str
    type: str
    is_array: bool = False
    default: str | None = None


@dataclass(frozen=True)
class Relation:
    """A table, a view, a composite type, or the shape of the rows that a function returns."""

    name: str
    columns: Mapping[str, Column]
    primary_key: tuple[str, ...] = ()
    is_type: bool = False

    @property
    def sql(self) -> str:
        return f"{quote_identifier(SCHEMA)}.{quote_identifier(self.name)}"


@dataclass(frozen=True)
class Function:
    """One overload of a function. `rows` is None for a scalar; the last `defaults` arguments are optional."""

    name: str
    arguments: tuple[Column, ...]
    defaults: int
    is_set: bool
    is_variadic: bool
    return_type: str
    rows: Relation | None
    by_name: Mapping[str, Column] = field(default_factory=dict)

    @property
    def sql(self) -> str:
        return f"{quote_identifier(SCHEMA)}.{quote_identifier(self.name)}"

    @property
    def required(self) -> frozenset[str]:
        count = len(self.arguments) - self.defaults
        return frozenset(argument.name for argument in self.arguments[:count])

    @property
    def takes_whole_body(self) -> bool:
        """Whether its one argument has no name, so that PostgREST fills it with the whole JSON body."""
        # https://docs.postgrest.org/en/v14/references/api/functions.html: single unnamed parameter
        if len(self.arguments) != 1:
            return False
        return self.arguments[0].name == "" and self.arguments[0].type in ("json", "jsonb")

    def accepts(self, names: Iterable[str]) -> bool:
        """Whether a call with exactly these named arguments fits."""
        named = frozenset(names)
        return self.required <= named and named <= self.by_name.keys()


@dataclass(frozen=True)
class Catalog:
    """The relations and functions of the exposed schema, as of one moment."""

    relations: Mapping[str, Relation]
    functions: Mapping[str, tuple[Function, ...]]


async def load_catalog(connection: PooledConnection) -> Catalog:
    """Reads the exposed schema in two round trips."""
    relations = _read_relations(orjson.loads(await connection.fetchval(RELATIONS, SCHEMA)))
    functions = orjson.loads(await connection.fetchval(FUNCTIONS, SCHEMA))
    return Catalog(relations, _read_functions(functions, relations))


def _read_relations(items: Mapping[str, Any]) -> dict[str, Relation]:
    return {name: _read_relation(name, item) for name, item in items.items()}


def _read_relation(name: str, item: Mapping[str, Any]) -> Relation:
    columns = [Column(c["name"], c["type"], c["is_array"], c["default"]) for c in item["columns"] or ()]
    by_name = {column.name: column for column in columns}
    return Relation(name, by_name, tuple(item["primary_key"] or ()), is_type=item["kind"] == "c")


def _read_functions(
    items: Iterable[Mapping[str, Any]], relations: Mapping[str, Relation]
) -> dict[str, tuple[Function, ...]]:
    overloads: dict[str, tuple[Function, ...]] = {}
    for item in items:
        overloads[item["name"]] = (*overloads.get(item["name"], ()), _read_function(item, relations))
    return overloads


def _read_function(item: Mapping[str, Any], relations: Mapping[str, Relation]) -> Function:
    declared = [(a["mode"], Column(a["name"], a["type"], a["is_array"])) for a in item["arguments"] or ()]
    # pg_proc.proargmodes: i is IN, v VARIADIC, o OUT, b both in and out, and t a column of RETURNS TABLE.
    arguments = tuple(column for mode, column in declared if mode in "ibv")
    returned = {column.name: column for mode, column in declared if mode in "tbo"}
    return Function(
        name=item["name"],
        arguments=arguments,
        defaults=item["defaults"],
        is_set=item["is_set"],
        is_variadic=item["variadic"],
        return_type=item["return_type"],
        rows=_returned_rows(item, returned, relations) if item["is_composite"] else None,
        by_name={argument.name: argument for argument in arguments if argument.name},
    )


def _returned_rows(
    item: Mapping[str, Any], returned: Mapping[str, Column], relations: Mapping[str, Relation]
) -> Relation:
    """The columns that a function returns: its own OUT arguments, or those of the relation it names."""
    if returned:
        return Relation(item["name"], returned)
    return relations.get(item["relation"], Relation(item["name"], {}))
