"""/images. Small valid PNGs, their colours derived from the prompt; every image is billed in tokens.

Shapes: OpenRouter's `ImageGenerationResponse`, and its events for providers that stream images.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator, Mapping

from sandbox.failures import refusal
from sandbox.models.pricing import Tokens
from sandbox.planning import Ask, Body, Plan, plan_media, too_long
from sandbox.routing import Route
from sandbox.tokens import IMAGE_TOKENS_AUTO, count
from sandbox.wire import dumps

from .dialect import DONE, Frame, Whole
from .usage import render_usage

MOST_ASKED, MOST_MADE = 10, 4
"""Images that may be asked for, and that are made: providers may return fewer."""
SIDE = 16
TOKENS_PER_IMAGE = {"low": 272, "medium": 1_056, "high": 4_160}
_GEMINI_TOKENS = 1_290


def answer_images(body: Body, ask: Ask) -> tuple[Plan, Images]:
    """Plan images; raises Refusal."""
    prompt, number, references = body.get("prompt"), body.get("n", 1), body.get("input_references")
    if not isinstance(prompt, str) or not prompt:
        raise refusal(400, "prompt: Invalid input: expected string", error_type="invalid_request")
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MOST_ASKED:
        raise refusal(400, f"n must be between 1 and {MOST_ASKED}", error_type="invalid_request")
    seen = len(references) if isinstance(references, list) else 0
    made = min(number, MOST_MADE)

    def tokens(route: Route) -> Tokens:
        drawn = made * _tokens_per_image(route, body.get("quality"))
        told = count(prompt) + seen * IMAGE_TOKENS_AUTO
        if told > route.model.context:
            raise too_long(route.model, told, 0)
        return Tokens(prompt=told, completion=drawn, image_out=drawn, images=seen)

    plan = plan_media(body, ask, "image", "image", tokens, streamed=body.get("stream") is True)
    return plan, Images([draw(f"{prompt}{place}") for place in range(made)])


class Images(Whole):
    """`/images`."""

    def __init__(self, pictures: list[bytes]) -> None:
        self._pictures = [base64.b64encode(picture).decode() for picture in pictures]

    def render(self, plan: Plan) -> Mapping[str, object]:
        data = [{"b64_json": picture, "media_type": "image/png"} for picture in self._pictures]
        body = {"created": plan.generation.created, "data": data}
        return (
            body if plan.behaviour.usage == "missing" else {**body, "usage": render_usage(plan, plan.tokens)}
        )

    def frames(self, plan: Plan) -> Iterator[Frame]:
        """A partial image and a complete one for each; the last says what all have cost."""
        share, last = plan.tokens.completion // len(self._pictures), len(self._pictures) - 1
        for place, picture in enumerate(self._pictures):
            partial = {
                "type": "image_generation.partial_image",
                "b64_json": picture,
                "partial_image_index": 0,
            }
            yield Frame(_event(partial), place * share + share // 2)
            completed = {
                "type": "image_generation.completed",
                "b64_json": picture,
                "created": plan.generation.created,
            }
            told = place == last and plan.behaviour.usage != "missing"
            usage = {"usage": render_usage(plan, plan.tokens)} if told else {}
            yield Frame(_event({**completed, "media_type": "image/png", **usage}), (place + 1) * share)
        if plan.behaviour.done:
            yield Frame(DONE, plan.tokens.completion)


def draw(text: str) -> bytes:
    """A PNG of 16 x 16 pixels; the same for the same text."""
    red, green, blue = zlib.crc32(text.encode()).to_bytes(4)[:3]
    rows = b"".join(b"\0" + bytes((red, green, (blue + 8 * row) % 256)) * SIDE for row in range(SIDE))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _tokens_per_image(route: Route, quality: object) -> int:
    if route.model.style == "google":
        return _GEMINI_TOKENS
    return TOKENS_PER_IMAGE.get(str(quality), TOKENS_PER_IMAGE["medium"])


def _event(event: Mapping[str, object]) -> bytes:
    return b"data: " + dumps(event) + b"\n\n"
