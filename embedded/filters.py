"""PostgREST's query string as SQL: select, filters, order and logic trees.

Names are looked up in the catalog and quoted, and values are parameters. No text of a client may become SQL.
The one exception is the type name of a cast, which may hold nothing but words.
https://docs.postgrest.org/en/v14/references/api/tables_views.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .catalog import Column, Relation, quote_identifier
from .postgrest_errors import PostgrestError, bad_request, not_implemented

COMPARISONS = {
    "eq": "=",
    "neq": "<>",
    "gt": ">",
    "gte": ">=",
    "lt": "<",
    "lte": "<=",
    "isdistinct": "is distinct from",
    "cs": "@>",
    "cd": "<@",
    "ov": "&&",
    "sl": "<<",
    "sr": ">>",
    "nxl": "&>",
    "nxr": "&<",
    "adj": "-|-",
}
PATTERNS = {"like": "like", "ilike": "ilike", "match": "~", "imatch": "~*"}
# The operators that take any or all, such as like(any).{a*,b*}.
QUANTIFIABLE = {"eq", "gt", "gte", "lt", "lte", *PATTERNS}
TEXT_SEARCHES = {
    "fts": "to_tsquery",
    "plfts": "plainto_tsquery",
    "phfts": "phraseto_tsquery",
    "wfts": "websearch_to_tsquery",
}
OPERATORS = {*COMPARISONS, *PATTERNS, *TEXT_SEARCHES, "in", "is"}
IS_VALUES = {
    "null": "null",
    "not_null": "not null",
    "true": "true",
    "false": "false",
    "unknown": "unknown",
}
DIRECTIONS = {"asc": "asc", "desc": "desc", "nullsfirst": "nulls first", "nullslast": "nulls last"}

OPERATION = re.compile(r"(?P<operator>[a-z]+)(?:\((?P<modifier>[^()]*)\))?\.(?P<value>.*)", re.DOTALL)
# A name may contain a hyphen, except where the hyphen begins the arrow of a JSON path.
NAME = r'"(?:[^"\\]|\\.)*"|[^",:>()*.-][^",:>().-]*(?:-(?!>)[^",:>().-]*)*'
SELECTED = re.compile(
    rf"(?:(?P<alias>{NAME}):(?!:))?(?P<field>(?:{NAME}|\*)(?:->>?(?:{NAME}|-?\d+))*)(?:::(?P<cast>[^:]+))?",
    re.DOTALL,
)
FIELD = re.compile(rf"(?P<column>{NAME})(?P<path>(?:->>?(?:{NAME}|-?\d+))*)", re.DOTALL)
STEP = re.compile(rf"(?P<arrow>->>?)(?P<key>{NAME}|-?\d+)", re.DOTALL)
# Words and an optional pair of brackets, such as double precision or int[]. Nothing else may reach the SQL.
TYPE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?: [A-Za-z_][A-Za-z0-9_]*)*(?:\[\])?")
# An element of (a,"b,c"), quoted or not, and in a logic tree also an array literal such as {1,2}.
LIST_ELEMENT = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"\s*(?=[,)])|([^,)]*))', re.DOTALL)
LOGIC_VALUE = re.compile(r'"((?:[^"\\]|\\.)*)"(?=\s*[,)])|(\{[^{}]*\})|([^,)]*)', re.DOTALL)
INDEX = re.compile(r"-?\d+")
LOGIC_GROUP = re.compile(r"\s*(not\.)?(and|or)\s*(?=\()")
LOGIC_FIELD = re.compile(rf"\s*({FIELD.pattern})\.")
LOGIC_OPERATION = re.compile(r"(?:not\.)?[a-z]+(?:\([^()]*\))?\.")
JSON_TYPES = ("json", "jsonb")


@dataclass
class Arguments:
    """The parameters of one statement, in the order of their numbers."""

    values: list[object] = field(default_factory=list)

    def bind(self, value: object, type_name: str = "text") -> str:
        """SQL that stands for the value, which PostgreSQL reads as it reads a literal of that type."""
        # asyncpg sends every value as text; without the first cast it would ask for a Python object of the
        # type.
        self.values.append(value)
        text = f"${len(self.values)}::text"
        return text if type_name == "text" else f"{text}::{type_name}"


@dataclass(frozen=True)
class Source:
    """The rows that a query reads: a relation of the catalog, and its name in the SQL."""

    relation: Relation
    alias: str
    arguments: Arguments

    def field(self, text: str) -> tuple[str, Column]:
        """A column or a path into its JSON, as SQL and with its type."""
        parsed = FIELD.fullmatch(text.strip())
        if parsed is None:
            raise not_implemented(f"The column expression {text!r}")
        column = self.column(unquoted(parsed["column"]))
        sql = f"{self.alias}.{quote_identifier(column.name)}"
        return self._json_path(sql, column, parsed["path"]) if parsed["path"] else (sql, column)

    def _json_path(self, sql: str, column: Column, path: str) -> tuple[str, Column]:
        """The value that a path such as ->city->>zip leads to; ->> reads it as text."""
        sql = sql if column.type in JSON_TYPES else f"to_jsonb({sql})"
        arrow = "->"
        for step in STEP.finditer(path):
            arrow, key = step["arrow"], step["key"]
            sql += f"{arrow}{self.arguments.bind(unquoted(key), 'int' if INDEX.fullmatch(key) else 'text')}"
        if arrow == "->>":
            return f"({sql})", Column("", "text")
        # A filter compares, and jsonb has an equality operator, unlike json.
        return f"({sql})::jsonb", Column("", "jsonb")

    def column(self, name: str) -> Column:
        """The column of that name. Raises PostgrestError as PostgreSQL does where there is none."""
        column = self.relation.columns.get(name)
        if column is None:
            raise PostgrestError(400, "42703", f"column {self.relation.name}.{name} does not exist")
        return column

    def selection(self, text: str) -> str:
        """The select list of a `select=` parameter."""
        items = [self._selected(item.strip()) for item in split_outside_quotes(text)]
        return ", ".join(items) or f"{self.alias}.*"

    def _selected(self, item: str) -> str:
        if item == "*":
            return f"{self.alias}.*"
        if "(" in item:
            raise not_implemented(f"Resource embedding and aggregates ({item!r})")
        parsed = SELECTED.fullmatch(item)
        if parsed is None or parsed["field"].startswith("*"):
            raise bad_request("PGRST100", f'"failed to parse select parameter ({item})"')
        sql, _ = self.field(parsed["field"])
        if parsed["cast"] is not None:
            sql = _cast(sql, parsed["cast"])
        name = unquoted(parsed["alias"]) if parsed["alias"] else _last_name(parsed["field"])
        return f"{sql} as {quote_identifier(name)}"

    def order(self, text: str) -> str:
        """The sort keys of an `order=` parameter."""
        return ", ".join(self._ordered(item.strip()) for item in split_outside_quotes(text))

    def _ordered(self, item: str) -> str:
        if "(" in item:
            raise not_implemented(f"Ordering by an embedded resource ({item!r})")
        name, *words = _split_dots(item)
        if any(word not in DIRECTIONS for word in words) or len(words) > 2:
            raise bad_request("PGRST100", f'"failed to parse order ({item})"')
        return " ".join([self.field(name)[0], *(DIRECTIONS[word] for word in words)])

    def condition(self, name: str, text: str) -> str:
        """The condition of one parameter, such as `age=gte.18` or `or=(a.eq.1,b.is.null)`."""
        negated = name.startswith("not.")
        if name.removeprefix("not.") in ("and", "or"):
            return LogicReader(self, text).tree(name.removeprefix("not."), negated=negated)
        if "." in name and not name.startswith('"'):
            raise not_implemented(f"Filtering an embedded resource ({name!r})")
        return self.operation(name, text)

    def operation(self, name: str, text: str) -> str:
        """The condition of a field and an operation, such as `not.eq.5`."""
        negated = text.startswith("not.")
        parsed = OPERATION.fullmatch(text.removeprefix("not."))
        if parsed is None or parsed["operator"] not in OPERATORS:
            raise bad_request("PGRST100", f'"failed to parse filter ({text})"')
        sql, column = self.field(name)
        condition = self._condition(sql, column, parsed["operator"], parsed["modifier"], parsed["value"])
        return f"not ({condition})" if negated else condition

    def _condition(self, sql: str, column: Column, operator: str, modifier: str | None, value: str) -> str:
        if operator in TEXT_SEARCHES:
            return self._text_search(sql, column, TEXT_SEARCHES[operator], modifier, value)
        if modifier is not None:
            return self._quantified(sql, column, operator, modifier, value)
        if operator == "in":
            return self._in_list(sql, column, value)
        if operator == "is":
            return f"{sql} is {_is_value(value)}"
        if operator in PATTERNS:
            return f"{sql} {PATTERNS[operator]} {self.arguments.bind(_pattern(operator, value))}"
        return f"{sql} {COMPARISONS[operator]} {self.arguments.bind(value, column.type)}"

    def _quantified(self, sql: str, column: Column, operator: str, modifier: str, value: str) -> str:
        if operator not in QUANTIFIABLE or modifier not in ("any", "all") or column.is_array:
            raise not_implemented(f"The operator {operator}({modifier}) on a column of type {column.type}")
        is_pattern = operator in PATTERNS
        array = self.arguments.bind(_pattern(operator, value), "text[]" if is_pattern else f"{column.type}[]")
        return f"{sql} {PATTERNS[operator] if is_pattern else COMPARISONS[operator]} {modifier} ({array})"

    def _in_list(self, sql: str, column: Column, value: str) -> str:
        elements = read_list(value)
        # An array of arrays would be one array of two dimensions, so arrays are compared one by one.
        if column.is_array:
            bound = ", ".join(self.arguments.bind(element, column.type) for element in elements)
            return f"{sql} in ({bound})"
        self.arguments.values.append(elements)
        return f"{sql} = any(${len(self.arguments.values)}::text[]::{column.type}[])"

    def _text_search(self, sql: str, column: Column, function: str, language: str | None, value: str) -> str:
        configuration = f"{self.arguments.bind(language, 'regconfig')}, " if language else ""
        vector = sql if column.type == "tsvector" else f"to_tsvector({configuration}{sql})"
        return f"{vector} @@ {function}({configuration}{self.arguments.bind(value)})"


class LogicReader:
    """Reads a logic tree such as `(a.eq.1,not.and(b.gt.2,c.in.(1,2)))`."""

    def __init__(self, source: Source, text: str) -> None:
        self._source = source
        self._text = text
        self._at = 0

    def tree(self, joint: str, *, negated: bool) -> str:
        """The whole text as one condition. Raises PostgrestError where it is not a logic tree."""
        condition = self._group(joint, negated=negated)
        if self._text[self._at :].strip():
            raise self._unreadable()
        return condition

    def _group(self, joint: str, *, negated: bool) -> str:
        self._skip("(")
        conditions = [self._member()]
        while self._peek() == ",":
            self._skip(",")
            conditions.append(self._member())
        self._skip(")")
        condition = "(" + f" {joint} ".join(conditions) + ")"
        return f"not {condition}" if negated else condition

    def _member(self) -> str:
        nested = LOGIC_GROUP.match(self._text, self._at)
        if nested:
            self._at = nested.end()
            return self._group(nested[2], negated=bool(nested[1]))
        name = LOGIC_FIELD.match(self._text, self._at)
        operation = LOGIC_OPERATION.match(self._text, name.end()) if name else None
        if name is None or operation is None:
            raise self._unreadable()
        self._at = operation.end()
        is_list = operation[0].removeprefix("not.") == "in."
        return self._source.operation(name[1], operation[0] + (self._list() if is_list else self._value()))

    def _value(self) -> str:
        match = LOGIC_VALUE.match(self._text, self._at)
        assert match is not None, "the last alternative matches the empty text"
        self._at = match.end()
        quoted, array, plain = match.groups()
        if quoted is not None:
            return unescaped(quoted)
        return array if array is not None else plain

    def _list(self) -> str:
        """The text of a list; its elements are read where the operation is."""
        start = self._at
        while self._peek() != ")":
            # Skips the opening parenthesis, and later each comma.
            self._at += 1
            element = LIST_ELEMENT.match(self._text, self._at)
            if element is None or element.end() >= len(self._text):
                raise self._unreadable()
            self._at = element.end()
        self._skip(")")
        return self._text[start : self._at]

    def _peek(self) -> str:
        rest = self._text[self._at :].lstrip()
        self._at = len(self._text) - len(rest)
        return rest[:1]

    def _skip(self, expected: str) -> None:
        if self._peek() != expected:
            raise self._unreadable()
        self._at += 1

    def _unreadable(self) -> PostgrestError:
        return bad_request("PGRST100", f'"failed to parse logic tree ({self._text})" (column {self._at + 1})')


def read_list(text: str) -> list[str]:
    """The elements of `(a,"b,c")`. Raises PostgrestError where the text is not a list."""
    if not text.startswith("(") or not text.rstrip().endswith(")"):
        raise _unreadable_list(text)
    elements: list[str] = []
    at = 0
    while text[at] != ")":
        element = LIST_ELEMENT.match(text, at + 1)
        if element is None or element.end() >= len(text):
            raise _unreadable_list(text)
        elements.append(unescaped(element[1]) if element[1] is not None else element[2])
        at = element.end()
    # () is an empty list, and ("") is a list of one empty text.
    return [] if elements == [""] and '"' not in text else elements


def _unreadable_list(text: str) -> PostgrestError:
    return bad_request("PGRST100", f'"failed to parse filter (in.{text})"')


def _is_value(value: str) -> str:
    keyword = IS_VALUES.get(value.strip().lower())
    if keyword is None:
        raise bad_request("PGRST100", f'"failed to parse filter (is.{value})"')
    return keyword


def _cast(sql: str, type_name: str) -> str:
    if not TYPE_NAME.fullmatch(type_name):
        raise bad_request("PGRST100", f'"failed to parse the type of a cast ({type_name})"')
    return f"cast({sql} as {type_name})"


def split_outside_quotes(text: str) -> list[str]:
    """The parts between the commas that are outside double quotes and parentheses."""
    parts, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        depth += 0 if quoted else (character == "(") - (character == ")")
        if character == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _split_dots(text: str) -> list[str]:
    """A name and the words behind it; a dot inside a quoted name separates nothing."""
    if not text.startswith('"'):
        return text.split(".")
    end = text.index('"', 1) + 1 if '"' in text[1:] else len(text)
    return [text[:end] + text[end:].split(".")[0], *text[end:].split(".")[1:]]


def unquoted(name: str) -> str:
    """A name without its double quotes, if it has any."""
    return unescaped(name[1:-1]) if name.startswith('"') else name.strip()


def unescaped(text: str) -> str:
    """The text with its backslash escapes resolved."""
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def _last_name(path: str) -> str:
    """The key of a result: the column, or the last step of a JSON path that is not an index."""
    parsed = FIELD.fullmatch(path)
    if parsed is None:
        return path
    names = [parsed["column"], *(step["key"] for step in STEP.finditer(parsed["path"]))]
    return unquoted(next(name for name in reversed(names) if not INDEX.fullmatch(name)))


def _pattern(operator: str, value: str) -> str:
    # PostgREST takes * for %, which would have to be escaped in a URL.
    return value.replace("*", "%") if operator in ("like", "ilike") else value
