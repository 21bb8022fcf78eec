"""`/audio/transcriptions`: made-up words, as many as the recording is long, and their cost.

A request is OpenRouter's JSON with `input_audio`, or OpenAI's upload. Shapes: `STTResponse` of OpenRouter's
OpenAPI document, and https://openrouter.ai/docs/guides/overview/multimodal/stt
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial

from sandbox import tokens
from sandbox.failures import invalid_request, refusal
from sandbox.models.entry import Model
from sandbox.models.pricing import Tokens
from sandbox.multipart import Part
from sandbox.planning import Body, Plan, RequestSettings, plan_media, too_long
from sandbox.routing import Route

from .dialect import JsonDialect
from .usage import render_cost

MAX_FILE_BYTES = 25 * 1024 * 1024
MAX_SECONDS_BY_TOKEN = 1_500
"""The longest recording for a model that is billed by tokens (OpenAI's limit for gpt-4o-transcribe)."""
BYTES_PER_SECOND = 16_000
"""The assumed rate of a recording whose header names none: 128 kbit/s."""
MAX_WORDS = 4_000
AUDIO_TOKENS_PER_SECOND = 10
WORDS_PER_SECOND = 2
FORMATS = ("json", "verbose_json", "text")
_SPOKEN = "This is what the sandbox has heard. It listens to nothing, and the words are always the same. "


@dataclass(frozen=True, slots=True)
class Recording:
    """What is transcribed: its length, and a number that stands for its content."""

    seconds: Decimal
    seed: int


def read_upload(parts: list[Part]) -> dict[str, object]:
    """The form as the body of the equivalent JSON request; raises Refusal (400, 413)."""
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


def plan_transcription(body: Body, settings: RequestSettings) -> tuple[Plan, Transcription]:
    """Plans a transcript; raises Refusal."""
    recording, text_format = _recording(_audio(body)), body.get("response_format", "json")
    if text_format not in FORMATS:
        raise invalid_request('response_format: Invalid option: expected one of "json"|"verbose_json"')
    prompt = body.get("prompt")
    hint = tokens.count(prompt) if isinstance(prompt, str) else 0
    pieces = _pieces(recording, settings.limits.answer_bytes)
    count_tokens = partial(_tokens, recording, hint, len(pieces))
    plan = plan_media(body, settings, "transcription", "stt", count_tokens)
    text = "".join(pieces[: _fitting(plan)]).strip()
    return plan, Transcription(recording, text, str(text_format), str(body.get("language") or "english"))


def _fitting(plan: Plan) -> int | None:
    """The number of tokens that the model may write; None for a model billed by duration."""
    return (plan.tokens.completion or None) if plan.model.unit == "token" else None


class Transcription(JsonDialect):
    """`/audio/transcriptions`."""

    def __init__(self, recording: Recording, text: str, text_format: str, language: str) -> None:
        self._recording = recording
        self._text = text
        self._format = text_format
        self._language = language

    def render(self, plan: Plan) -> Mapping[str, object] | str:
        if self._format == "text":
            return f"{self._text}\n"
        usage = {} if plan.behaviour.usage == "missing" else {"usage": self._usage(plan)}
        details = self._details() if self._format == "verbose_json" else {}
        return {**details, "text": self._text, **usage}

    def _usage(self, plan: Plan) -> dict[str, object]:
        """Models billed by duration report only that, and others report their tokens, too."""
        seconds = Decimal(0) if plan.behaviour.cache == "hit" else self._recording.seconds
        counts = {} if plan.model.unit == "second" else _token_counts(plan.tokens)
        return {"seconds": seconds, **counts, **render_cost(plan, plan.tokens)}

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


def _token_counts(used: Tokens) -> dict[str, object]:
    total = used.prompt + used.completion
    return {"input_tokens": used.prompt, "output_tokens": used.completion, "total_tokens": total}


def _audio(body: Body) -> bytes:
    """The recording: the uploaded file, or else the base64 data."""
    uploaded, input_audio = body.get("file"), body.get("input_audio")
    if isinstance(uploaded, bytes) and uploaded:
        return uploaded
    data = input_audio.get("data") if isinstance(input_audio, Mapping) else None
    if not isinstance(data, str) or not data:
        raise invalid_request("input_audio: expected base64 data and its format, or a form with a file")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise invalid_request("input_audio.data: expected base64") from None


def _recording(audio: bytes) -> Recording:
    rate = BYTES_PER_SECOND
    # A WAV file has its bytes per second at offset 28.
    if audio[:4] == b"RIFF" and audio[8:12] == b"WAVE" and len(audio) >= 32:
        rate = max(1, struct.unpack_from("<I", audio, 28)[0])
    return Recording(max(Decimal("0.1"), round(Decimal(len(audio)) / rate, 1)), zlib.crc32(audio))


def _pieces(recording: Recording, max_bytes: int | None) -> list[str]:
    """The transcript's tokens, within the limit of a response's size."""
    number = min(max(1, int(recording.seconds * WORDS_PER_SECOND)), MAX_WORDS)
    words = _SPOKEN.split()
    text = " ".join(words[(recording.seed + position) % len(words)] for position in range(number))
    return tokens.split(text if max_bytes is None else text[:max_bytes])


def _tokens(recording: Recording, hint: int, output: int, route: Route) -> Tokens:
    """The tokens of a transcript: `hint` of the prompt, and `output` of the text before the model's limit."""
    _require_short(recording, route.model)
    if route.model.unit == "second":
        billed = max(1, round(recording.seconds))
        return Tokens(prompt=billed, audio_in=billed)
    audio = max(1, int(recording.seconds * AUDIO_TOKENS_PER_SECOND))
    if audio + hint + output > route.model.context:
        raise too_long(route.model, audio + hint, output)
    completion = min(output, route.model.max_completion or output)
    return Tokens(prompt=audio + hint, audio_in=audio, completion=completion)


def _require_short(recording: Recording, model: Model) -> None:
    # The context length of a model that is billed by duration is in seconds.
    longest = model.context if model.unit == "second" else MAX_SECONDS_BY_TOKEN
    if recording.seconds > longest:
        seconds = recording.seconds
        raise invalid_request(f"audio duration {seconds} seconds is longer than {longest} seconds")
