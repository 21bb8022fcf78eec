"""Generation ids that carry their cost. Its id says it, so that any instance can answer, also after the one
that made it died.

`gen-<unix seconds>-<payload>`, or `gen-tts-...` where OpenRouter names the kind. The payload is base62 of a
version byte, the numbers below as LEB128 varints, and a CRC-16 that makes a random id unreadable. The cost is
written in femto-dollars, exactly.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal

from .models.pricing import Tokens
from .models.text_models import MODELS

API_TYPES = ("completions", "embeddings", "rerank", "tts", "stt", "image")
FINISHES = ("stop", "length", "tool_calls", "content_filter", "error")
FEMTO = 15
FOREVER = 255
"""As `late_lookups`: never found."""

_KINDS = frozenset(API_TYPES[2:])
_VERSION = 2
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PAIRS = [high + low for high in _DIGITS for low in _DIGITS]
_MODEL_CODES = {zlib.crc32(model.id.encode()): model for model in MODELS}
_NUMBERS = 20
_MAX_DIGITS = 120


@dataclass(frozen=True, slots=True)
class Generation:
    """What `/generation` tells about one generation."""

    created: int
    model: str
    provider: str
    tokens: Tokens
    cost: Decimal
    """US dollars billed by OpenRouter."""
    upstream_cost: Decimal = Decimal(0)
    """US dollars billed by the provider to the own key (BYOK only)."""
    finish: str = "stop"
    api_type: str = "completions"
    streamed: bool = False
    byok: bool = False
    cached_answer: bool = False
    late_lookups: int = 0
    cancelled: bool = False

    def cancel(self, tokens: Tokens, cost: Decimal, upstream_cost: Decimal) -> Generation:
        """The same generation, ended by the client after these tokens."""
        return replace(self, tokens=tokens, cost=cost, upstream_cost=upstream_cost, cancelled=True)


def encode(generation: Generation, nonce: int) -> str:
    """The id of a generation; the nonce (40 bits) makes it unique."""
    model = _MODEL_CODES[zlib.crc32(generation.model.encode())]
    providers = [endpoint.provider for endpoint in model.endpoints]
    tokens = generation.tokens
    numbers = (
        zlib.crc32(model.id.encode()),
        providers.index(generation.provider),
        generation.streamed | generation.byok << 1 | generation.cached_answer << 2,
        API_TYPES.index(generation.api_type),
        FINISHES.index(generation.finish),
        tokens.prompt,
        tokens.completion,
        tokens.reasoning,
        tokens.cached,
        tokens.cache_write,
        tokens.images,
        tokens.searches,
        tokens.audio_in,
        tokens.audio_out,
        tokens.image_out,
        tokens.units,
        int(generation.cost.scaleb(FEMTO)),
        int(generation.upstream_cost.scaleb(FEMTO)),
        generation.late_lookups,
        nonce,
    )
    payload = bytes((_VERSION,)) + b"".join(map(_varint, numbers))
    start = f"gen-{_kind(generation)}-" if _kind(generation) else "gen-"
    return f"{start}{generation.created}-{_base62(payload + _checksum(generation.created, payload))}"


def _kind(generation: Generation) -> str:
    """What the id names between `gen` and the time; nothing for text and embeddings."""
    return generation.api_type if generation.api_type in _KINDS else ""


def decode(generation_id: str) -> Generation | None:
    """The generation behind an id, or None when it is none of ours."""
    start, _, rest = generation_id.partition("-")
    kind, _, after = rest.partition("-")
    seconds, _, digits = after.partition("-") if kind in _KINDS else rest.partition("-")
    if start != "gen" or not (seconds.isascii() and seconds.isdecimal()) or len(seconds) > 12:
        return None
    created, raw = int(seconds), _from_base62(digits)
    payload, checksum = raw[:-2], raw[-2:]
    if len(raw) < 3 or payload[0] != _VERSION or checksum != _checksum(created, payload):
        return None
    generation = _read(created, list(_numbers(payload[1:])))
    return (
        generation
        if generation is not None and _kind(generation) == (kind if kind in _KINDS else "")
        else None
    )


def _read(created: int, numbers: list[int]) -> Generation | None:
    if len(numbers) != _NUMBERS:
        return None
    code, provider, flags, api_type, finish, *counts, cost, upstream_cost, late_lookups, _ = numbers
    model = _MODEL_CODES.get(code)
    if (
        model is None
        or provider >= len(model.endpoints)
        or api_type >= len(API_TYPES)
        or finish >= len(FINISHES)
    ):
        return None
    return Generation(
        created=created,
        model=model.id,
        provider=model.endpoints[provider].provider,
        tokens=Tokens(*counts),
        cost=Decimal(cost).scaleb(-FEMTO),
        upstream_cost=Decimal(upstream_cost).scaleb(-FEMTO),
        finish=FINISHES[finish],
        api_type=API_TYPES[api_type],
        streamed=bool(flags & 1),
        byok=bool(flags & 2),
        cached_answer=bool(flags & 4),
        late_lookups=late_lookups,
    )


def render(generation_id: str, generation: Generation) -> dict[str, object]:
    """`data` of `/generation`."""
    tokens = generation.tokens
    latency, took = 240 + tokens.prompt % 400, 12 * tokens.completion
    return {
        "id": generation_id,
        "upstream_id": f"chatcmpl-{generation_id[-12:]}",
        "request_id": f"req-{generation_id[4:]}",
        "model": generation.model,
        "provider_name": generation.provider,
        "api_type": generation.api_type,
        "created_at": _timestamp(generation.created),
        "streamed": generation.streamed,
        "cancelled": generation.cancelled,
        "finish_reason": None if generation.cancelled else generation.finish,
        "native_finish_reason": None if generation.cancelled else generation.finish,
        "total_cost": generation.cost,
        "usage": generation.cost,
        "upstream_inference_cost": generation.upstream_cost if generation.byok else None,
        "is_byok": generation.byok,
        "cache_discount": None,
        "tokens_prompt": tokens.prompt,
        "tokens_completion": tokens.completion,
        "native_tokens_prompt": tokens.prompt,
        "native_tokens_completion": tokens.completion,
        "native_tokens_reasoning": tokens.reasoning,
        "native_tokens_cached": tokens.cached,
        "native_tokens_completion_images": tokens.image_out,
        "num_media_prompt": tokens.images or None,
        "num_media_completion": None,
        "num_input_audio_prompt": 1 if tokens.audio_in else None,
        "num_search_results": tokens.searches or None,
        "num_fetches": None,
        "web_search_engine": "exa" if tokens.searches else None,
        "latency": latency,
        "generation_time": took,
        "moderation_latency": None,
        "origin": "https://openrouter.ai/",
        "http_referer": None,
        "user_agent": None,
        "app_id": None,
        "external_user": None,
        "session_id": None,
        "preset_id": None,
        "router": None,
        "service_tier": None,
        "data_region": "global",
        "provider_responses": [
            {
                "provider_name": generation.provider,
                "status": 200,
                "latency": latency,
                "is_byok": generation.byok,
            }
        ],
        "response_cache_source_id": generation_id if generation.cached_answer else None,
    }


def _timestamp(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _varint(number: int) -> bytes:
    if number <= 0x7F:
        return bytes((number,))
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _numbers(payload: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in payload:
        number |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            yield number
            number = shift = 0


def _checksum(created: int, payload: bytes) -> bytes:
    return (zlib.crc32(payload, created & 0xFFFFFFFF) & 0xFFFF).to_bytes(2)


def _base62(raw: bytes) -> str:
    number, pairs = int.from_bytes(raw), []
    while number:
        number, pair = divmod(number, len(_PAIRS))
        pairs.append(_PAIRS[pair])
    return "".join(reversed(pairs)).lstrip("0")


def _from_base62(digits: str) -> bytes:
    if not digits or len(digits) > _MAX_DIGITS or any(digit not in _DIGITS for digit in digits):
        return b""
    number = 0
    for digit in digits:
        number = number * 62 + _DIGITS.index(digit)
    return number.to_bytes((number.bit_length() + 7) // 8)
