"""/audio/speech. A hum, in pieces, of a length that the text sets; what it cost only `/generation` says.

Shapes: https://openrouter.ai/docs/guides/overview/multimodal/tts
"""

from __future__ import annotations

import array
import math
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping

from sandbox.failures import refusal
from sandbox.models.pricing import Tokens
from sandbox.planning import Ask, Body, Plan, plan_media
from sandbox.routing import Route
from sandbox.tokens import count

from .dialect import Frame, Whole

MAX_CHARACTERS = 4_096
CHARACTERS_PER_SECOND = 15
TOKENS_PER_SECOND = 25
PIECES_PER_SECOND = 10
MAX_AUDIO_BYTES = 256 * 1024
RATE = 24_000
MEDIA_TYPES = {"mp3": "audio/mpeg", "pcm": f"audio/pcm;rate={RATE};channels=1", "wav": "audio/wav"}

# A silent MPEG-2 layer III frame: 24 kHz, mono, 32 kbit/s, 24 ms in 96 bytes. Four of them make a piece.
_MP3_PIECE = (b"\xff\xf3\x44\xc0" + bytes(92)) * 4


def answer_speech(body: Body, ask: Ask) -> tuple[Plan, Speech]:
    """Plan a speech; raises Refusal."""
    text, form = body.get("input"), body.get("response_format", "pcm")
    if not isinstance(text, str) or not 1 <= len(text) <= MAX_CHARACTERS:
        raise refusal(400, f"input: expected 1 to {MAX_CHARACTERS} characters", error_type="invalid_request")
    if not isinstance(form, str) or form not in MEDIA_TYPES:
        raise refusal(
            400, 'response_format: Invalid option: expected one of "mp3"|"pcm"', error_type="invalid_request"
        )
    plan = plan_media(body, ask, "speech", "tts", lambda route: _tokens(text, route), streamed=True)
    _require_voice(body.get("voice"), plan)
    return plan, Speech(text, form, ask.limits.answer_bytes)


class Speech(Whole):
    """`/audio/speech`: bytes, as they are made."""

    only_streams = True
    farewell = b""

    def __init__(self, text: str, form: str, most_bytes: int | None) -> None:
        self.stream_type = MEDIA_TYPES[form]
        piece = _MP3_PIECE if form == "mp3" else hum(zlib.crc32(text.encode()))
        most = MAX_AUDIO_BYTES if most_bytes is None else min(MAX_AUDIO_BYTES, most_bytes)
        pieces = max(1, len(text) * PIECES_PER_SECOND // CHARACTERS_PER_SECOND)
        self._pieces = [piece[:most]] * max(1, min(pieces, most // len(piece)))
        if form == "wav":
            self._pieces[0] = _wav_header(sum(map(len, self._pieces))) + self._pieces[0]

    def render(self, plan: Plan) -> Mapping[str, object]:
        """What stands where the audio should, when a scenario asks for another body."""
        return {"id": plan.id, "object": "audio.speech", "model": plan.model.id}

    def frames(self, plan: Plan) -> Iterator[Frame]:
        whole, pieces = plan.tokens.completion, len(self._pieces)
        for place, piece in enumerate(self._pieces, 1):
            yield Frame(piece, whole * place // pieces)


def hum(seed: int) -> bytes:
    """A tenth of a second of a tone, 16 bits, which can be repeated without a click."""
    cycles = 20 + seed % 40
    length = RATE // PIECES_PER_SECOND
    samples = array.array(
        "h", (round(6_000 * math.sin(2 * math.pi * cycles * place / length)) for place in range(length))
    )
    if sys.byteorder == "big":
        samples.byteswap()
    return samples.tobytes()


def _wav_header(size: int) -> bytes:
    return b"RIFF" + struct.pack(
        "<I4s4sIHHIIHH4sI", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16, b"data", size
    )


def _tokens(text: str, route: Route) -> Tokens:
    if route.model.unit == "character":
        return Tokens(prompt=len(text))
    spoken = -(-len(text) * TOKENS_PER_SECOND // CHARACTERS_PER_SECOND)
    spoken = min(spoken, route.model.max_completion or spoken)
    return Tokens(prompt=count(text), completion=spoken, audio_out=spoken)


def _require_voice(voice: object, plan: Plan) -> None:
    if voice is not None and voice not in plan.model.voices:
        known = ", ".join(plan.model.voices)
        raise refusal(400, f"voice: {plan.model.id} has {known}", error_type="invalid_request")
