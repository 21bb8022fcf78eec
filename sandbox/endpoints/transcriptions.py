"""/audio/transcriptions. Made-up words, as many as the recording is long, and what they cost.

Both forms of request: OpenRouter's JSON with `input_audio`, and OpenAI's upload. Shapes: OpenRouter's
`STTResponse`.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from sandbox import tokens
from sandbox.failures import refusal
from sandbox.models.pricing import Tokens
from sandbox.multipart import Part
from sandbox.planning import Ask, Body, Plan, plan_media, too_long
from sandbox.routing import Route

from .dialect import Whole
from .usage import render_cost

MAX_FILE_BYTES = 25 * 1024 * 1024
MAX_SECONDS_BY_TOKEN = 1_500
"""What a model that is billed by tokens takes at most (OpenAI's limit of gpt-4o-transcribe)."""
BYTES_PER_SECOND = 16_000
"""Of recordings whose header says nothing: 128 kbit/s."""
AUDIO_TOKENS_PER_SECOND = 10
WORDS_PER_SECOND = 2
FORMATS = ("json", "verbose_json", "text")
_SPOKEN = "This is what the sandbox has heard. It listens to nothing, and the words are always the same. "


@dataclass(frozen=True, slots=True)
class Recording:
    """What is transcribed: how long it is, and a number that stands for its content."""

    seconds: Decimal
    seed: int


def read_upload(parts: list[Part]) -> dict[str, object]:
    """A form as the body that the JSON request would have; raises Refusal (400, 413)."""
    body: dict[str, object] = {}
    for part in parts:
        if part.name == "file":
            if len(part.content) > MAX_FILE_BYTES:
                raise refusal(413, "Payload too large", error_type="payload_too_large")
            body["file"] = part.content
        else:
            body[part.name.removesuffix("[]")] = part.content.decode("utf-8", "replace")
    body["stream"] = False
    return body


def answer_transcription(body: Body, ask: Ask) -> tuple[Plan, Transcription]:
    """Plan a transcript; raises Refusal."""
    recording, form = _recording(_audio(body)), body.get("response_format", "json")
    if form not in FORMATS:
        raise refusal(
            400,
            'response_format: Invalid option: expected one of "json"|"verbose_json"',
            error_type="invalid_request",
        )
    prompt = body.get("prompt")
    hint = tokens.count(prompt) if isinstance(prompt, str) else 0
    pieces = _pieces(recording, ask.limits.answer_bytes)
    plan = plan_media(
        body, ask, "transcription", "stt", lambda route: _tokens(recording, hint, len(pieces), route)
    )
    heard = (
        pieces[: plan.tokens.completion] if plan.model.unit == "token" and plan.tokens.completion else pieces
    )
    return plan, Transcription(
        recording, "".join(heard).strip(), str(form), str(body.get("language") or "english")
    )


class Transcription(Whole):
    """`/audio/transcriptions`."""

    def __init__(self, recording: Recording, text: str, form: str, language: str) -> None:
        self._recording = recording
        self._text = text
        self._form = form
        self._language = language

    def render(self, plan: Plan) -> Mapping[str, object] | str:
        if self._form == "text":
            return f"{self._text}\n"
        usage = {} if plan.behaviour.usage == "missing" else {"usage": self._usage(plan)}
        details = self._details() if self._form == "verbose_json" else {}
        return {**details, "text": self._text, **usage}

    def _usage(self, plan: Plan) -> dict[str, object]:
        """Models billed by duration say only that, others their tokens too."""
        seconds = Decimal(0) if plan.behaviour.cache == "hit" else self._recording.seconds
        counted = plan.tokens
        if plan.model.unit == "second":
            return {"seconds": seconds, **render_cost(plan, counted)}
        total = counted.prompt + counted.completion
        spent = {"input_tokens": counted.prompt, "output_tokens": counted.completion, "total_tokens": total}
        return {"seconds": seconds, **spent, **render_cost(plan, counted)}

    def _details(self) -> dict[str, object]:
        segment = {
            "id": 0,
            "seek": 0,
            "start": 0,
            "end": self._recording.seconds,
            "text": self._text,
            "temperature": 0,
        }
        return {
            "task": "transcribe",
            "language": self._language,
            "duration": self._recording.seconds,
            "segments": [segment],
        }


def _audio(body: Body) -> bytes:
    uploaded, said = body.get("file"), body.get("input_audio")
    if isinstance(uploaded, bytes) and uploaded:
        return uploaded
    data = said.get("data") if isinstance(said, Mapping) else None
    if not isinstance(data, str) or not data:
        raise refusal(
            400,
            "input_audio: expected base64 data and its format, or a form with a file",
            error_type="invalid_request",
        )
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise refusal(400, "input_audio.data: expected base64", error_type="invalid_request") from None


def _recording(audio: bytes) -> Recording:
    rate = BYTES_PER_SECOND
    if audio[:4] == b"RIFF" and audio[8:12] == b"WAVE" and len(audio) >= 32:
        rate = max(1, struct.unpack_from("<I", audio, 28)[0])
    return Recording(max(Decimal("0.1"), round(Decimal(len(audio)) / rate, 1)), zlib.crc32(audio))


def _pieces(recording: Recording, most_bytes: int | None) -> list[str]:
    """The transcript's tokens; no longer than anyone may be told."""
    wanted = min(max(1, int(recording.seconds * WORDS_PER_SECOND)), 4_000)
    words = _SPOKEN.split()
    text = " ".join(words[(recording.seed + place) % len(words)] for place in range(wanted))
    return tokens.split(text if most_bytes is None else text[:most_bytes])


def _tokens(recording: Recording, hint: int, written: int, route: Route) -> Tokens:
    model, seconds = route.model, recording.seconds
    longest = model.context if model.unit == "second" else MAX_SECONDS_BY_TOKEN
    if seconds > longest:
        raise refusal(
            400,
            f"audio duration {seconds} seconds is longer than {longest} seconds",
            error_type="invalid_request",
        )
    if model.unit == "second":
        billed = max(1, round(seconds))
        return Tokens(prompt=billed, audio_in=billed)
    heard = max(1, int(seconds * AUDIO_TOKENS_PER_SECOND))
    if heard + hint + written > model.context:
        raise too_long(model, heard + hint, written)
    return Tokens(
        prompt=heard + hint, audio_in=heard, completion=min(written, model.max_completion or written)
    )
