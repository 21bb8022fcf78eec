"""`/images`: small valid PNGs with colours derived from the prompt. Every image is billed in tokens.

Shapes: `ImageGenerationResponse` of OpenRouter's OpenAPI document, and its events for providers that stream
images.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping

from sandbox.failures import invalid_request
from sandbox.models.pricing import Tokens
from sandbox.planning import Body, Plan, RequestSettings, plan_media, too_long
from sandbox.routing import Route
from sandbox.tokens import IMAGE_TOKENS_AUTO, count

from .dialect import DONE, Frame, JsonDialect, data_event
from .usage import render_usage

MAX_REQUESTED, MAX_MADE = 10, 4
"""The most images that a request may want, and that it gets: providers may return fewer."""
SIDE = 16
# https://platform.openai.com/docs/guides/image-generation: tokens of a square image, by quality.
TOKENS_PER_IMAGE = {"low": 272, "medium": 1_056, "high": 4_160}
# https://ai.google.dev/gemini-api/docs/pricing: an image is 1,290 tokens whatever its quality.
_GEMINI_TOKENS = 1_290


def plan_images(body: Body, settings: RequestSettings) -> tuple[Plan, Images]:
    """Plans images; raises Refusal."""
    prompt, number = _require_prompt(body), _require_number(body)
    count_tokens = _token_counter(prompt, number, body)
    streamed = body.get("stream") is True
    plan = plan_media(body, settings, "image", "image", count_tokens, streamed=streamed)
    return plan, Images([draw(f"{prompt}{index}") for index in range(number)])


def _require_prompt(body: Body) -> str:
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise invalid_request("prompt: Invalid input: expected string")
    return prompt


def _require_number(body: Body) -> int:
    """The number of images that are made."""
    number = body.get("n", 1)
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MAX_REQUESTED:
        raise invalid_request(f"n must be between 1 and {MAX_REQUESTED}")
    return min(number, MAX_MADE)


def _token_counter(prompt: str, number: int, body: Body) -> Callable[[Route], Tokens]:
    references = body.get("input_references")
    images = len(references) if isinstance(references, list) else 0

    def count_tokens(route: Route) -> Tokens:
        output = number * _tokens_per_image(route, body.get("quality"))
        prompt_tokens = count(prompt) + images * IMAGE_TOKENS_AUTO
        if prompt_tokens > route.model.context:
            raise too_long(route.model, prompt_tokens, 0)
        return Tokens(prompt=prompt_tokens, completion=output, image_out=output, images=images)

    return count_tokens


class Images(JsonDialect):
    """`/images`."""

    def __init__(self, pictures: list[bytes]) -> None:
        self._pictures = [base64.b64encode(picture).decode() for picture in pictures]

    def render(self, plan: Plan) -> Mapping[str, object]:
        data = [{"b64_json": picture, "media_type": "image/png"} for picture in self._pictures]
        return {"created": plan.generation.created, "data": data, **_usage(plan)}

    def frames(self, plan: Plan) -> Iterator[Frame]:
        """A partial image and a complete one for each. The last event has the usage of all."""
        tokens_each = plan.tokens.completion // len(self._pictures)
        for index, picture in enumerate(self._pictures):
            partial = {
                "type": "image_generation.partial_image",
                "b64_json": picture,
                "partial_image_index": 0,
            }
            yield Frame(data_event(partial), index * tokens_each + tokens_each // 2)
            is_last = index == len(self._pictures) - 1
            yield Frame(self._completed(plan, picture, is_last=is_last), (index + 1) * tokens_each)
        if plan.behaviour.done:
            yield Frame(DONE, plan.tokens.completion)

    def _completed(self, plan: Plan, picture: str, *, is_last: bool) -> bytes:
        completed = {
            "type": "image_generation.completed",
            "b64_json": picture,
            "created": plan.generation.created,
            "media_type": "image/png",
        }
        return data_event({**completed, **(_usage(plan) if is_last else {})})


def _usage(plan: Plan) -> dict[str, object]:
    return {} if plan.behaviour.usage == "missing" else {"usage": render_usage(plan, plan.tokens)}


def draw(text: str) -> bytes:
    """A PNG of 16 x 16 pixels. It is the same for the same text."""
    red, green, blue = zlib.crc32(text.encode()).to_bytes(4)[:3]
    rows = b"".join(b"\0" + bytes((red, green, (blue + 8 * row) % 256)) * SIDE for row in range(SIDE))
    # 8 bits a sample, colour type 2 (RGB): https://www.w3.org/TR/png-3/#11IHDR
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _tokens_per_image(route: Route, quality: object) -> int:
    if route.model.style == "google":
        return _GEMINI_TOKENS
    return TOKENS_PER_IMAGE.get(str(quality), TOKENS_PER_IMAGE["medium"])
