"""`/audio/speech`: a hum in pieces, as long as the text. Only `/generation` says what it cost.

Shapes: https://openrouter.ai/docs/guides/overview/multimodal/tts
"""

from __future__ import annotations

import array
import math
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping

from sandbox.failures import invalid_request
from sandbox.models.pricing import Tokens
from sandbox.planning import Body, Plan, RequestSettings, plan_media
from sandbox.routing import Route
from sandbox.tokens import count

from .dialect import Frame, JsonDialect

MAX_CHARACTERS = 4_096
CHARACTERS_PER_SECOND = 15
TOKENS_PER_SECOND = 25
PIECES_PER_SECOND = 10
MAX_AUDIO_BYTES = 256 * 1024
RATE = 24_000
MEDIA_TYPES = {"mp3": "audio/mpeg", "pcm": f"audio/pcm;rate={RATE};channels=1", "wav": "audio/wav"}

# A silent MPEG-2 layer III frame: 24 kHz, mono, 32 kbit/s, 24 ms in 96 bytes. Four of them make a piece.
_MP3_PIECE = (b"\xff\xf3\x44\xc0" + bytes(92)) * 4


def plan_speech(body: Body, settings: RequestSettings) -> tuple[Plan, Speech]:
    """Plans speech; raises Refusal."""
    text, audio_format = body.get("input"), body.get("response_format", "pcm")
    if not isinstance(text, str) or not 1 <= len(text) <= MAX_CHARACTERS:
        raise invalid_request(f"input: expected 1 to {MAX_CHARACTERS} characters")
    if not isinstance(audio_format, str) or audio_format not in MEDIA_TYPES:
        raise invalid_request('response_format: Invalid option: expected one of "mp3"|"pcm"')
    plan = plan_media(body, settings, "speech", "tts", lambda route: _tokens(text, route), streamed=True)
    _require_voice(body.get("voice"), plan)
    return plan, Speech(text, audio_format, settings.limits.answer_bytes)


class Speech(JsonDialect):
    """`/audio/speech`: bytes as they are made, without events."""

    only_streams = True
    farewell = b""

    def __init__(self, text: str, audio_format: str, max_bytes: int | None) -> None:
        self.stream_type = MEDIA_TYPES[audio_format]
        piece = _MP3_PIECE if audio_format == "mp3" else hum(zlib.crc32(text.encode()))
        limit = MAX_AUDIO_BYTES if max_bytes is None else min(MAX_AUDIO_BYTES, max_bytes)
        number = max(1, len(text) * PIECES_PER_SECOND // CHARACTERS_PER_SECOND)
        self._pieces = [piece[:limit]] * max(1, min(number, limit // len(piece)))
        if audio_format == "wav":
            self._pieces[0] = _wav_header(sum(map(len, self._pieces))) + self._pieces[0]

    def render(self, plan: Plan) -> Mapping[str, object]:
        """The body of scenarios that replace the audio."""
        return {"id": plan.id, "object": "audio.speech", "model": plan.model.id}

    def frames(self, plan: Plan) -> Iterator[Frame]:
        for number, piece in enumerate(self._pieces, 1):
            yield Frame(piece, plan.tokens.completion * number // len(self._pieces))


def hum(seed: int) -> bytes:
    """A tenth of a second of a tone in 16-bit samples, which can be repeated without a click."""
    # Whole cycles, so that the end of a piece meets the beginning of the next.
    cycles = 20 + seed % 40
    length = RATE // PIECES_PER_SECOND
    angles = (2 * math.pi * cycles * position / length for position in range(length))
    samples = array.array("h", (round(6_000 * math.sin(angle)) for angle in angles))
    if sys.byteorder == "big":
        samples.byteswap()
    return samples.tobytes()


def _wav_header(size: int) -> bytes:
    """The 44 bytes before the samples: PCM, mono, 16 bits."""
    fields = (36 + size, b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16, b"data", size)
    return b"RIFF" + struct.pack("<I4s4sIHHIIHH4sI", *fields)


def _tokens(text: str, route: Route) -> Tokens:
    if route.model.unit == "character":
        return Tokens(prompt=len(text))
    audio = -(-len(text) * TOKENS_PER_SECOND // CHARACTERS_PER_SECOND)
    audio = min(audio, route.model.max_completion or audio)
    return Tokens(prompt=count(text), completion=audio, audio_out=audio)


def _require_voice(voice: object, plan: Plan) -> None:
    if voice is not None and voice not in plan.model.voices:
        known = ", ".join(plan.model.voices)
        raise invalid_request(f"voice: {plan.model.id} has {known}")
