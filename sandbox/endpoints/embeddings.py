"""`/embeddings`: unit vectors derived from the input, as floats or base64.

Shapes: https://platform.openai.com/docs/api-reference/embeddings, with OpenRouter's usage.
"""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Mapping

from sandbox.failures import invalid_request
from sandbox.models.pricing import Tokens
from sandbox.planning import Body, Plan, RequestSettings, plan_media, too_long
from sandbox.tokens import count_inputs
from sandbox.wire import dumps

from .dialect import JsonDialect
from .usage import render_usage

DIMENSIONS = 1536
MAX_INPUTS = 2048
# Embeddings have no completion, so that usage has no counts of one.
_USAGE_FIELDS = frozenset({"prompt_tokens", "total_tokens", "cost", "is_byok", "cost_details"})


def plan_embeddings(body: Body, settings: RequestSettings) -> tuple[Plan, Embeddings]:
    """Plans embeddings; raises Refusal."""
    inputs = count_inputs(body.get("input"))
    if not inputs or len(inputs) > MAX_INPUTS:
        raise invalid_request(f"input must be a text or 1 to {MAX_INPUTS} of them")
    _dimensions(body)
    plan = plan_media(body, settings, "embeddings", "embeddings", lambda route: Tokens(prompt=sum(inputs)))
    if max(inputs) > plan.model.context:
        raise too_long(plan.model, max(inputs), 0)
    return plan, Embeddings(body)


class Embeddings(JsonDialect):
    """`/embeddings`."""

    def __init__(self, body: Body) -> None:
        self._body = body

    def render(self, plan: Plan) -> Mapping[str, object]:
        return render_embeddings(plan, self._body)


def _dimensions(body: Body) -> int:
    dimensions = body.get("dimensions", DIMENSIONS)
    if not isinstance(dimensions, int) or not 1 <= dimensions <= DIMENSIONS:
        raise invalid_request(f"dimensions must be between 1 and {DIMENSIONS}")
    return dimensions


def render_embeddings(plan: Plan, body: Mapping[str, object]) -> dict[str, object]:
    """The body of an embeddings response."""
    dimensions = _dimensions(body)
    vectors = [_encode(_vector(item, dimensions), body) for item in _inputs(body["input"])]
    response: dict[str, object] = {
        "object": "list",
        "id": plan.id,
        "model": plan.model.id,
        "provider": plan.route.endpoint.provider,
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(vectors)
        ],
    }
    if plan.behaviour.usage != "missing":
        usage = render_usage(plan, plan.tokens)
        response["usage"] = {name: value for name, value in usage.items() if name in _USAGE_FIELDS}
    return response


def _inputs(value: object) -> list[object]:
    # A list of numbers is one input: the ids of its tokens.
    if isinstance(value, list) and not all(isinstance(item, int) for item in value):
        return value
    return [value]


def _vector(item: object, dimensions: int) -> list[float]:
    # An extendable hash gives as many bytes as there are dimensions, and the same ones for the same input.
    noise = hashlib.shake_256(dumps(item)).digest(dimensions)
    raw = [byte - 127.5 for byte in noise]
    length = math.hypot(*raw)
    return [value / length for value in raw]


def _encode(vector: list[float], body: Mapping[str, object]) -> object:
    if body.get("encoding_format") != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
