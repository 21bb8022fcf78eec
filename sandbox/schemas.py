"""One deterministic value that conforms to a JSON schema, for tool arguments and structured outputs.

It covers what clients use in practice: types, enums, constants, nested objects and arrays, bounds, formats,
local references and combinators. A `pattern` is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal
from typing import TypeAlias

Schema: TypeAlias = Mapping[str, object]

# A schema can refer to itself, so that its depth, its values and its texts need bounds.
MAX_DEPTH = 8
MAX_VALUES = 2000
MAX_LENGTH = 10_000
_FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "email": "ada@example.com",
    "uuid": "6f1f7a1e-3b5c-4c8e-9d55-0a7f6b1c2d3e",
    "uri": "https://example.com/",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
}


def sample(schema: object, words: str) -> object:
    """A value that conforms to the schema. Free texts are made of `words`."""
    if not isinstance(schema, Mapping):
        return {}
    return _Sampler(schema, words or "sandbox").value(schema, 0)


class _Sampler:
    def __init__(self, root: Schema, words: str) -> None:
        self._root = root
        self._words = words
        self._values_left = MAX_VALUES

    def value(self, schema: object, depth: int) -> object:
        if not isinstance(schema, Mapping):
            return self._words
        self._values_left -= 1
        if depth > MAX_DEPTH or self._values_left < 0:
            return None
        if isinstance(schema.get("$ref"), str):
            return self.value(self._resolve(str(schema["$ref"])), depth + 1)
        if "const" in schema:
            return schema["const"]
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return schema["enum"][0]
        return self._combined(schema, depth)

    def _combined(self, schema: Schema, depth: int) -> object:
        for name in ("anyOf", "oneOf"):
            options = schema.get(name)
            if isinstance(options, list) and options:
                return self.value(_first_not_null(options), depth + 1)
        if isinstance(schema.get("allOf"), list):
            return self.value(self._merge(schema), depth + 1)
        return self._typed(schema, depth)

    def _typed(self, schema: Schema, depth: int) -> object:
        kind = _type_of(schema)
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind in ("integer", "number"):
            return _number(schema, kind)
        if kind == "boolean":
            return True
        return None if kind == "null" else self._text(schema)

    def _object(self, schema: Schema, depth: int) -> dict[str, object]:
        properties = schema.get("properties")
        known: Mapping[str, object] = properties if isinstance(properties, Mapping) else {}
        required = schema.get("required")
        needed = required if isinstance(required, list) else []
        # Deep down only what is required, or a schema that contains itself would use up all values.
        names = [name for name in known if name in needed or depth < MAX_DEPTH // 2]
        value = {name: self.value(known[name], depth + 1) for name in names}
        return value | {name: self._words for name in needed if name not in known}

    def _array(self, schema: Schema, depth: int) -> list[object]:
        leading = schema.get("prefixItems")
        items = [self.value(item, depth + 1) for item in leading] if isinstance(leading, list) else []
        missing = _array_length(schema, len(items), depth) - len(items)
        rest = [self.value(schema.get("items", {"type": "string"}), depth + 1) for _ in range(missing)]
        return items + (_distinct(rest) if schema.get("uniqueItems") is True else rest)

    def _text(self, schema: Schema) -> str:
        if isinstance(schema.get("format"), str) and schema["format"] in _FORMATS:
            return _FORMATS[str(schema["format"])]
        least = min(_whole(schema, "minLength", 0), MAX_LENGTH)
        text = self._words * (least // len(self._words) + 1)
        return text[: _whole(schema, "maxLength", max(least, len(self._words)))]

    def _merge(self, schema: Schema) -> dict[str, object]:
        merged: dict[str, object] = {name: value for name, value in schema.items() if name != "allOf"}
        parts = schema["allOf"]
        for part in parts if isinstance(parts, list) else []:
            if isinstance(part, Mapping) and isinstance(part.get("$ref"), str):
                part = self._resolve(str(part["$ref"]))
            if isinstance(part, Mapping):
                merged = _join(merged, part)
        return merged

    def _resolve(self, reference: str) -> object:
        """The schema that a local reference such as #/$defs/city leads to."""
        schema: object = self._root
        for name in reference.removeprefix("#").strip("/").split("/"):
            if name:
                schema = schema.get(name, {}) if isinstance(schema, Mapping) else {}
        return schema


def _array_length(schema: Schema, leading: int, depth: int) -> int:
    least = _whole(schema, "minItems", 0 if leading or depth >= MAX_DEPTH // 2 else 1)
    most = _whole(schema, "maxItems", max(least, 1))
    return min(max(least, leading), max(most, leading), MAX_VALUES)


def _distinct(items: list[object]) -> list[object]:
    return [
        f"{item} {number}" if number and isinstance(item, str) else item for number, item in enumerate(items)
    ]


def _join(first: Mapping[str, object], second: Mapping[str, object]) -> dict[str, object]:
    """Both schemas as one. Their properties and required names are united, and otherwise the second wins."""
    joined = {**first, **second}
    for name in ("properties", "required"):
        one, two = first.get(name), second.get(name)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            joined[name] = {**one, **two}
        elif isinstance(one, list) and isinstance(two, list):
            joined[name] = [*one, *two]
    return joined


def _first_not_null(options: list[object]) -> object:
    is_null = [isinstance(item, Mapping) and item.get("type") == "null" for item in options]
    return options[is_null.index(False)] if False in is_null else options[0]


def _type_of(schema: Schema) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((name for name in kind if name != "null"), "null")
    if isinstance(kind, str):
        return kind
    if "properties" in schema or not schema:
        return "object" if "properties" in schema else "string"
    return "array" if "items" in schema else "string"


def _whole(schema: Schema, name: str, default: int) -> int:
    value = schema.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default


def _bound(schema: Schema, name: str) -> Decimal | None:
    value = schema.get(name)
    return Decimal(str(value)) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _number(schema: Schema, kind: str) -> int | Decimal:
    value = _bounded(schema, _step(schema, kind))
    return int(value) if value == value.to_integral_value() else value


def _step(schema: Schema, kind: str) -> Decimal:
    """What the value must be a multiple of. Half numbers show that a `number` need not be whole."""
    if kind == "number" and "multipleOf" not in schema:
        return Decimal("0.5")
    return _bound(schema, "multipleOf") or Decimal(1)


def _bounded(schema: Schema, step: Decimal) -> Decimal:
    least, above = _bound(schema, "minimum"), _bound(schema, "exclusiveMinimum")
    most, below = _bound(schema, "maximum"), _bound(schema, "exclusiveMaximum")
    if least is not None or above is not None:
        floor = max(bound for bound in (least, above) if bound is not None)
        value = (floor / step).to_integral_value(rounding=ROUND_CEILING) * step
        return value + step if above is not None and value <= above else value
    if (most is not None and step > most) or (below is not None and step >= below):
        ceiling = min(bound for bound in (most, below) if bound is not None)
        # One step below the ceiling satisfies an exclusive maximum, too.
        return (ceiling // step - 1) * step
    return step
