"""What does `/embeddings` answer? Unit vectors derived from the input, in the two encodings that clients ask for."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Mapping

from .dialects import render_usage
from .failures import refusal
from .planning import Plan
from .wire import dumps

DIMENSIONS = 1536
MAX_INPUTS = 2048


def dimensions_of(body: Mapping[str, object]) -> int:
    """The length of the vectors asked for; raises Refusal (400)."""
    wanted = body.get("dimensions", DIMENSIONS)
    if not isinstance(wanted, int) or not 1 <= wanted <= DIMENSIONS:
        raise refusal(400, f"dimensions must be between 1 and {DIMENSIONS}", error_type="invalid_request")
    return wanted


def render_embeddings(plan: Plan, body: Mapping[str, object]) -> dict[str, object]:
    """The body of an embeddings answer."""
    inputs, dimensions = _inputs(body["input"]), dimensions_of(body)
    usage = render_usage(plan, plan.tokens)
    kept = ("prompt_tokens", "total_tokens", "cost", "is_byok", "cost_details")
    answer: dict[str, object] = {
        "object": "list",
        "id": plan.id,
        "model": plan.model.id,
        "provider": plan.route.endpoint.provider,
        "data": [
            {"object": "embedding", "index": index, "embedding": _encode(_vector(item, dimensions), body)}
            for index, item in enumerate(inputs)
        ],
    }
    if plan.behaviour.usage != "missing":
        answer["usage"] = {name: usage[name] for name in kept}
    return answer


def _inputs(value: object) -> list[object]:
    if isinstance(value, list) and not all(isinstance(item, int) for item in value):
        return value
    return [value]


def _vector(item: object, dimensions: int) -> list[float]:
    noise = hashlib.shake_256(dumps(item)).digest(dimensions)
    raw = [byte - 127.5 for byte in noise]
    length = math.hypot(*raw)
    return [value / length for value in raw]


def _encode(vector: list[float], body: Mapping[str, object]) -> object:
    if body.get("encoding_format") != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
