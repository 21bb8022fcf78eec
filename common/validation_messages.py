"""Pydantic's validation errors as sentences for people who use the API or configure the gateway."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Context = Mapping[str, Any]

DATETIME = "must be a time in ISO 8601, such as 2026-01-31T12:00:00Z"
# What the models' patterns require. A test fails when a pattern is missing here.
PATTERNS = {
    r"^[^\x00-\x1f\x7f]+$": "must not be empty or contain control characters",
    r"^[^\x00]*$": "must not contain a NUL character",
    r"^(\*|[a-z][a-z0-9_-]*)$": "must be a scope's name in lower case, such as chat, or * for all",
    r"^[^\x00-\x20*]*\*?$": "must be a model id, or the start of one followed by *",
    r"^(\*\.)?([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9-]{1,63}$": (
        "must be a host name such as example.com, or *.example.com, without scheme, port and path"
    ),
    r"^[a-z0-9][a-z0-9-]{0,62}$": (
        "must be at most 63 lower-case letters, digits and hyphens, and must not start with a hyphen"
    ),
    r"^sk-or-v1-[0-9a-f]{64}$": "must be an OpenRouter key: sk-or-v1- and 64 digits from 0-9 and a-f",
    r"^[\x21-\x7e]{16,256}$": "must have 16 to 256 printable characters and no spaces",
}


def _entries(ctx: Context, bound: str) -> str:
    number = ctx[bound]
    return f"{number} entry" if number == 1 else f"{number} entries"


def _custom(ctx: Context) -> str:
    """What our own validator raised, or a reason that pydantic gives with the error."""
    if "error" in ctx:
        return str(ctx["error"])
    return f"is not valid: {ctx.get('reason', 'see the documentation')}"


# https://docs.pydantic.dev/latest/errors/validation_errors/ lists the types and what their contexts hold.
SENTENCES: dict[str, Callable[[Context], str]] = {
    "missing": lambda ctx: "is missing",
    "extra_forbidden": lambda ctx: "is not a known field; check its spelling",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), lambda ctx: "must be a whole number"),
    "int_parsing_size": lambda ctx: "is too large a number",
    **dict.fromkeys(
        ("float_type", "float_parsing", "decimal_type", "decimal_parsing"), lambda ctx: "must be a number"
    ),
    **dict.fromkeys(
        ("ip_v4_network", "ip_v6_network"),
        lambda ctx: "must be addresses or networks such as 203.0.113.0/24, comma-separated",
    ),
    "finite_number": lambda ctx: "must be a finite number",
    "decimal_max_places": lambda ctx: f"must have at most {ctx['decimal_places']} decimal places",
    "decimal_max_digits": lambda ctx: f"must have at most {ctx['max_digits']} digits",
    "decimal_whole_digits": lambda ctx: f"must have at most {ctx['whole_digits']} digits before the point",
    "greater_than": lambda ctx: f"must be greater than {ctx['gt']}",
    "greater_than_equal": lambda ctx: f"must be at least {ctx['ge']}",
    "less_than": lambda ctx: f"must be less than {ctx['lt']}",
    "less_than_equal": lambda ctx: f"must be at most {ctx['le']}",
    "string_type": lambda ctx: "must be a string",
    "string_unicode": lambda ctx: "must be Unicode text, without lone surrogates",
    "string_too_short": lambda ctx: (
        "must not be empty"
        if ctx["min_length"] == 1
        else f"must have at least {ctx['min_length']} characters"
    ),
    "string_too_long": lambda ctx: f"must have at most {ctx['max_length']} characters",
    "string_pattern_mismatch": lambda ctx: PATTERNS.get(str(ctx["pattern"]), f"must match {ctx['pattern']}"),
    **dict.fromkeys(("bool_type", "bool_parsing"), lambda ctx: "must be true or false"),
    **dict.fromkeys(("enum", "literal_error"), lambda ctx: f"must be {ctx['expected']}"),
    "list_type": lambda ctx: "must be a list",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), lambda ctx: "must be an object"),
    "too_short": lambda ctx: f"must have at least {_entries(ctx, 'min_length')}",
    "too_long": lambda ctx: f"must have at most {_entries(ctx, 'max_length')}",
    **dict.fromkeys(("uuid_type", "uuid_parsing"), lambda ctx: "must be a request id (a UUID)"),
    **dict.fromkeys(
        ("datetime_type", "datetime_parsing", "datetime_from_date_parsing", "datetime_object_invalid"),
        lambda ctx: DATETIME,
    ),
    "timezone_aware": lambda ctx: "must have a time zone, such as the Z in 2026-01-31T12:00:00Z",
    "value_error": _custom,
}

# The same for a body that is not an object at all: whoever sent it needs to know what an object looks like.
OBJECT = 'a JSON object, such as {"name": "value"}'
WHOLE_BODY = {
    "missing": f"is missing: send {OBJECT}",
    **dict.fromkeys(("model_attributes_type", "model_type"), f"must be {OBJECT}"),
}


def predicate(error: Mapping[str, Any]) -> str:
    """What one of pydantic's errors says about its field, without the field's name."""
    sentence = SENTENCES.get(error["type"])
    # A type that is not listed keeps pydantic's own wording.
    text = str(error["msg"]) if sentence is None else sentence(error.get("ctx") or {})
    return text.rstrip(".")


def describe(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """The sentence for one of pydantic's errors, and its field (dotted), which is None for the whole body."""
    ctx: Context = error.get("ctx") or {}
    # The first part is where in the request the field is, such as `body`. A field may have the same name.
    path = [str(part) for part in error["loc"][1:] if part != "[key]"]
    # A validator of a whole model can name the field that it complains about.
    path += [name for name in (getattr(ctx.get("error"), "field", None),) if name is not None]
    field = ".".join(path) or None
    if field is None:
        return f"The request body {WHOLE_BODY.get(error['type']) or predicate(error)}.", None
    return f"`{field}` {predicate(error)}.", field
