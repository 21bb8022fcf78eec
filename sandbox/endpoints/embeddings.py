"""/embeddings. Unit vectors derived from the input, in the two encodings that clients ask for."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Mapping

from sandbox.failures import refusal
from sandbox.models.pricing import Tokens
from sandbox.planning import Ask, Body, Plan, plan_media, too_long
from sandbox.tokens import count_inputs
from sandbox.wire import dumps

from .dialect import Whole
from .usage import render_usage

DIMENSIONS = 1536
MAX_INPUTS = 2048


def answer_embeddings(body: Body, ask: Ask) -> tuple[Plan, Embeddings]:
    """Plan an embeddings answer; raises Refusal."""
    inputs = count_inputs(body.get("input"))
    if not inputs or len(inputs) > MAX_INPUTS:
        raise refusal(400, f"input must be a text or 1 to {MAX_INPUTS} of them", error_type="invalid_request")
    _dimensions(body)
    plan = plan_media(body, ask, "embeddings", "embeddings", lambda route: Tokens(prompt=sum(inputs)))
    if max(inputs) > plan.model.context:
        raise too_long(plan.model, max(inputs), 0)
    return plan, Embeddings(body)


class Embeddings(Whole):
    """`/embeddings`."""

    def __init__(self, body: Body) -> None:
        self._body = body

    def render(self, plan: Plan) -> Mapping[str, object]:
        return render_embeddings(plan, self._body)


def _dimensions(body: Body) -> int:
    wanted = body.get("dimensions", DIMENSIONS)
    if not isinstance(wanted, int) or not 1 <= wanted <= DIMENSIONS:
        raise refusal(400, f"dimensions must be between 1 and {DIMENSIONS}", error_type="invalid_request")
    return wanted


def render_embeddings(plan: Plan, body: Mapping[str, object]) -> dict[str, object]:
    """The body of an embeddings answer."""
    inputs, dimensions = _inputs(body["input"]), _dimensions(body)
    usage = render_usage(plan, plan.tokens)
    kept = {"prompt_tokens", "total_tokens", "cost", "is_byok", "cost_details"}
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
        answer["usage"] = {name: value for name, value in usage.items() if name in kept}
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
