"""Generation ids that contain their cost, so that any instance can answer `/generation`, with no shared
memory.

An id is `gen-<unix seconds>-<payload>`, or `gen-tts-...` where OpenRouter names the kind. The payload is the
base62 notation of a version byte, of the numbers below as LEB128 varints, and of a 16-bit checksum, so that a
random id is not mistaken for one of ours. The cost is in femto-dollars, exactly.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from decimal import Decimal

from sandbox.models.pricing import Tokens
from sandbox.models.text_models import MODELS

API_TYPES = ("completions", "embeddings", "rerank", "tts", "stt", "image")
FINISHES = ("stop", "length", "tool_calls", "content_filter", "error")
FEMTO = 15
FOREVER = 255
"""As `late_lookups`: never found."""

_KINDS = frozenset(API_TYPES[2:])
# To be raised when the numbers change, so that ids of an older version are unknown instead of misread.
_VERSION = 2
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PAIRS = [high + low for high in _DIGITS for low in _DIGITS]
# A checksum of the name and not the place in the list, so that ids outlive a change of the list.
_MODEL_CODES = {zlib.crc32(model.id.encode()): model for model in MODELS}
_COUNTS = tuple(field.name for field in fields(Tokens))
# Nine numbers besides the token counts.
_NUMBERS = 9 + len(_COUNTS)
# Longer than any id of ours: converting base62 takes time that grows with the square of the length.
_MAX_DIGITS = 120


@dataclass(frozen=True, slots=True)
class Generation:
    """What `/generation` says about one generation."""

    created: int
    model: str
    provider: str
    tokens: Tokens
    cost: Decimal
    """US dollars billed by OpenRouter."""
    upstream_cost: Decimal = Decimal(0)
    """US dollars billed by the provider to the operator's own key (BYOK only)."""
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
    """The id of a generation. The nonce (40 bits) makes it unique."""
    payload = bytes((_VERSION,)) + b"".join(map(_varint, _to_numbers(generation, nonce)))
    start = f"gen-{_kind(generation)}-" if _kind(generation) else "gen-"
    return f"{start}{generation.created}-{_base62(payload + _checksum(generation.created, payload))}"


def _to_numbers(generation: Generation, nonce: int) -> tuple[int, ...]:
    model = _MODEL_CODES[zlib.crc32(generation.model.encode())]
    providers = [endpoint.provider for endpoint in model.endpoints]
    return (
        zlib.crc32(model.id.encode()),
        providers.index(generation.provider),
        generation.streamed | generation.byok << 1 | generation.cached_answer << 2,
        API_TYPES.index(generation.api_type),
        FINISHES.index(generation.finish),
        *(getattr(generation.tokens, name) for name in _COUNTS),
        int(generation.cost.scaleb(FEMTO)),
        int(generation.upstream_cost.scaleb(FEMTO)),
        generation.late_lookups,
        nonce,
    )


def _kind(generation: Generation) -> str:
    """What the id names between `gen` and the time: nothing for text and embeddings."""
    return generation.api_type if generation.api_type in _KINDS else ""


def decode(generation_id: str) -> Generation | None:
    """The generation behind an id; None when the id is not one of ours."""
    kind, seconds, digits = _split_id(generation_id)
    if not (seconds.isascii() and seconds.isdecimal()) or len(seconds) > 12:
        return None
    payload = _read_payload(int(seconds), _from_base62(digits))
    if payload is None:
        return None
    generation = _from_numbers(int(seconds), list(_numbers(payload)))
    return generation if generation is not None and _kind(generation) == kind else None


def _split_id(generation_id: str) -> tuple[str, str, str]:
    """The kind, the seconds and the payload's digits of an id; no seconds where the id is not one of ours."""
    start, _, rest = generation_id.partition("-")
    kind, _, after = rest.partition("-")
    if kind not in _KINDS:
        kind, after = "", rest
    seconds, _, digits = after.partition("-")
    return kind, seconds if start == "gen" else "", digits


def _read_payload(created: int, raw: bytes) -> bytes | None:
    """The numbers' bytes, without the version and the checksum, which must be right."""
    payload, checksum = raw[:-2], raw[-2:]
    if len(raw) < 3 or payload[0] != _VERSION or checksum != _checksum(created, payload):
        return None
    return payload[1:]


def _from_numbers(created: int, numbers: list[int]) -> Generation | None:
    if len(numbers) != _NUMBERS:
        return None
    code, provider, flags, api_type, finish, *counts, cost, upstream_cost, late_lookups, _ = numbers
    model = _MODEL_CODES.get(code)
    if model is None or provider >= len(model.endpoints):
        return None
    if api_type >= len(API_TYPES) or finish >= len(FINISHES):
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


def render_generation(generation_id: str, generation: Generation) -> dict[str, object]:
    """`data` of `/generation`, in the shape of OpenRouter's API reference."""
    latency = 240 + generation.tokens.prompt % 400
    return {
        "id": generation_id,
        "upstream_id": f"chatcmpl-{generation_id[-12:]}",
        "request_id": f"req-{generation_id[4:]}",
        **_render_end(generation),
        **_render_cost(generation),
        **_render_tokens(generation.tokens),
        "latency": latency,
        "generation_time": 12 * generation.tokens.completion,
        **_CONSTANT_FIELDS,
        "provider_responses": [_render_provider_response(generation, latency)],
        "response_cache_source_id": generation_id if generation.cached_answer else None,
    }


def _render_end(generation: Generation) -> dict[str, object]:
    # A cancelled generation has no finish reason, because the provider never sent one.
    finish = None if generation.cancelled else generation.finish
    return {
        "model": generation.model,
        "provider_name": generation.provider,
        "api_type": generation.api_type,
        "created_at": _timestamp(generation.created),
        "streamed": generation.streamed,
        "cancelled": generation.cancelled,
        "finish_reason": finish,
        "native_finish_reason": finish,
    }


def _render_cost(generation: Generation) -> dict[str, object]:
    return {
        "total_cost": generation.cost,
        "usage": generation.cost,
        "upstream_inference_cost": generation.upstream_cost if generation.byok else None,
        "is_byok": generation.byok,
        "cache_discount": None,
    }


def _render_tokens(tokens: Tokens) -> dict[str, object]:
    """The counts of the provider's tokenizer (`native`) are the same as OpenRouter's here."""
    return {
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
    }


def _render_provider_response(generation: Generation, latency: int) -> dict[str, object]:
    return {
        "provider_name": generation.provider,
        "status": 200,
        "latency": latency,
        "is_byok": generation.byok,
    }


_CONSTANT_FIELDS: Mapping[str, object] = {
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
}


def _timestamp(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _varint(number: int) -> bytes:
    """LEB128: seven bits a byte, the lowest first; the eighth bit says that more bytes follow."""
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
    # Two digits at a time halve the divisions of a long number.
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
