"""Pydantic's findings as sentences. Pydantic's findings in the words of somebody who uses the API, or sets it
up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Context = Mapping[str, Any]


def _entries(ctx: Context, bound: str) -> str:
    many = ctx[bound]
    return f"{many} entry" if many == 1 else f"{many} entries"


# What the models' patterns ask for; a test finds the one that is missing here.
PATTERNS = {
    r"^[^\x00-\x1f\x7f]+$": "must not be empty or hold control characters",
    r"^[^\x00]*$": "must not hold a NUL character",
    r"^(\*|[a-z][a-z0-9_-]*)$": "must be the name of a scope in small letters, such as chat, or * for all",
    r"^[^\x00-\x20*]*\*?$": "must be a model's id, or the beginning of one followed by *",
    r"^(\*\.)?([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9-]{1,63}$": (
        "must be a host name such as example.com, or *.example.com, without scheme, port and path"
    ),
    r"^[a-z0-9][a-z0-9-]{0,62}$": "must be at most 63 small letters, digits and hyphens, and begin with no hyphen",
    r"^sk-or-v1-[0-9a-f]{64}$": "must be a key of OpenRouter: sk-or-v1- and 64 digits from 0-9 and a-f",
    r"^[\x21-\x7e]{16,256}$": "must have 16 to 256 printable characters and no blank",
}


SENTENCES: dict[str, Callable[[Context], str]] = {
    "missing": lambda ctx: "is missing",
    "extra_forbidden": lambda ctx: "is not known here; check its spelling",
    "int_type": lambda ctx: "must be a whole number",
    "int_parsing": lambda ctx: "must be a whole number",
    "int_parsing_size": lambda ctx: "is a number beyond all limits",
    "int_from_float": lambda ctx: "must be a whole number",
    "float_type": lambda ctx: "must be a number",
    "float_parsing": lambda ctx: "must be a number",
    **dict.fromkeys(
        ("ip_v4_network", "ip_v6_network"),
        lambda ctx: "must be addresses or networks such as 203.0.113.0/24, comma-separated",
    ),
    "decimal_type": lambda ctx: "must be a number",
    "decimal_parsing": lambda ctx: "must be a number",
    "finite_number": lambda ctx: "must be a finite number",
    "decimal_max_places": lambda ctx: f"may have at most {ctx['decimal_places']} decimals",
    "decimal_max_digits": lambda ctx: f"may have at most {ctx['max_digits']} digits",
    "decimal_whole_digits": lambda ctx: f"may have at most {ctx['whole_digits']} digits before the point",
    "greater_than": lambda ctx: f"must be greater than {ctx['gt']}",
    "greater_than_equal": lambda ctx: f"must be at least {ctx['ge']}",
    "less_than": lambda ctx: f"must be less than {ctx['lt']}",
    "less_than_equal": lambda ctx: f"must be at most {ctx['le']}",
    "string_type": lambda ctx: "must be a text",
    "string_unicode": lambda ctx: "must be a text in Unicode, without half surrogates",
    "string_too_short": lambda ctx: (
        "must not be empty"
        if ctx["min_length"] == 1
        else f"must have at least {ctx['min_length']} characters"
    ),
    "string_too_long": lambda ctx: f"may have at most {ctx['max_length']} characters",
    "string_pattern_mismatch": lambda ctx: PATTERNS.get(str(ctx["pattern"]), f"must match {ctx['pattern']}"),
    "bool_type": lambda ctx: "must be true or false",
    "bool_parsing": lambda ctx: "must be true or false",
    "enum": lambda ctx: f"must be {ctx['expected']}",
    "literal_error": lambda ctx: f"must be {ctx['expected']}",
    "list_type": lambda ctx: "must be a list",
    "dict_type": lambda ctx: "must be an object",
    "model_type": lambda ctx: "must be an object",
    "model_attributes_type": lambda ctx: "must be an object",
    "too_short": lambda ctx: f"must have at least {_entries(ctx, 'min_length')}",
    "too_long": lambda ctx: f"may have at most {_entries(ctx, 'max_length')}",
    "uuid_type": lambda ctx: "must be the id of a request (a UUID)",
    "uuid_parsing": lambda ctx: "must be the id of a request (a UUID)",
    "datetime_type": lambda ctx: "must be a time in ISO 8601, such as 2026-01-31T12:00:00Z",
    "datetime_parsing": lambda ctx: "must be a time in ISO 8601, such as 2026-01-31T12:00:00Z",
    "datetime_from_date_parsing": lambda ctx: "must be a time in ISO 8601, such as 2026-01-31T12:00:00Z",
    "datetime_object_invalid": lambda ctx: "must be a time in ISO 8601, such as 2026-01-31T12:00:00Z",
    "timezone_aware": lambda ctx: "must name its time zone, such as the Z of 2026-01-31T12:00:00Z",
    "value_error": lambda ctx: (
        str(ctx["error"]) if "error" in ctx else f"is not valid: {ctx.get('reason', 'see the documentation')}"
    ),
}


# The same of a body that is no object at all: its sender needs to know what would be one.
OBJECT = 'a JSON object, such as {"name": "value"}'
WHOLE_BODY = {
    "missing": f"is missing: send {OBJECT}",
    **dict.fromkeys(("model_attributes_type", "model_type"), f"must be {OBJECT}"),
}


def predicate(finding: Mapping[str, Any]) -> str:
    """What one of pydantic's findings says of its field, without the field's name."""
    make = SENTENCES.get(finding["type"])
    return (str(finding["msg"]) if make is None else make(finding.get("ctx") or {})).rstrip(".")


def describe(finding: Mapping[str, Any]) -> tuple[str, str | None]:
    """The sentence for one of pydantic's findings, and the field it is about (dotted), None for the body as a
    whole.
    """
    ctx: Context = finding.get("ctx") or {}
    # The first part says where in the request: a field may have the same name.
    where = [str(part) for part in finding["loc"][1:] if part != "[key]"]
    where += [each for each in (getattr(ctx.get("error"), "field", None),) if each is not None]
    field = ".".join(where) or None
    if field is None:
        return f"The request body {WHOLE_BODY.get(finding['type']) or predicate(finding)}.", None
    return f"`{field}` {predicate(finding)}.", field
