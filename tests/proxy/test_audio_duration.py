"""An upper bound of a recording's length, read from its bytes: what is plain counts as it is, what a decoder
could take for more does not.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import wave
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UnboundedCost
from gateway.pricing.catalog import read_models
from gateway.pricing.upper_bound import Bound, bound_request
from gateway.proxy.audio_duration import seconds_of_audio, seconds_of_file
from gateway.proxy.endpoints import endpoint_of
from gateway.proxy.request import read_request
from tests.support.bounds import INDEX, POLICY, entry

WAV, MP3 = "audio/wav", "audio/mpeg"


def wav(
    seconds: float = 1, *, rate: int = 8_000, width: int = 2, channels: int = 1, fill: bytes = b"\x00"
) -> bytes:
    """As Python's own writer makes it."""
    made = io.BytesIO()
    with wave.open(made, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes(
            (fill * (int(seconds * rate) * width * channels))[: int(seconds * rate) * width * channels]
        )
    return made.getvalue()


def header(
    samples: bytes,
    *,
    tag: int = 1,
    channels: int = 1,
    rate: int = 8_000,
    bits: int = 16,
    claimed: int | None = None,
    **wrong: int,
) -> bytes:
    block = wrong.get("block", channels * bits // 8)
    format_chunk = struct.pack(
        "<HHIIHH", tag, channels, rate, wrong.get("per_second", rate * block), block, bits
    )
    size = len(samples) if claimed is None else claimed
    return (
        b"RIFF\xff\xff\xff\x7fWAVEfmt \x10\0\0\0" + format_chunk + b"data" + struct.pack("<I", size) + samples
    )


def mp3(frames: int, first: bytes = b"", *, head: bytes = b"\xff\xe3\x18\xc4") -> bytes:
    """Frames of 8 kbit/s at 8 kHz, the slowest there are: 72 bytes for 576 samples."""
    silence = head + bytes(68)
    return (head + bytes(9) + first).ljust(72, b"\0") + silence * (frames - 1)


def of(content: bytes, name: str = "a.wav", content_type: str = WAV) -> int | None:
    return seconds_of_file(content, name, content_type)


# WAV.


@pytest.mark.parametrize(
    ("seconds", "options"),
    [
        (1, {}),
        (0.5, {}),
        (90, {"rate": 44_100, "channels": 2}),
        (10, {"width": 1}),
        (7, {"width": 3, "rate": 96_000, "channels": 2}),
    ],
)
def test_a_wav_of_plain_samples_lasts_as_long_as_it_says(seconds: float, options: dict[str, int]) -> None:
    bound = of(
        wav(
            seconds,
            rate=options.get("rate", 8_000),
            width=options.get("width", 2),
            channels=options.get("channels", 1),
        )
    )
    assert bound is not None and seconds <= bound <= seconds + 2


@pytest.mark.parametrize(
    "content",
    [
        header(
            bytes(16_000), rate=1, per_second=2_000_000
        ),  # plays for hours, at a byte rate that says otherwise
        header(bytes(16_000), rate=1),
        header(bytes(16_000), per_second=1_000_000),
        header(bytes(16_000), block=64),
        header(bytes(16_000), rate=4_000_000_000, per_second=4_000_000_000),
        header(bytes(16_000), channels=0),
        header(bytes(16_000), channels=9),
        header(bytes(16_000), bits=12),
        *(header(bytes(16_000), tag=tag) for tag in (0, 2, 0x11, 0x31, 0x50, 0x55, 0xFF, 0xFFFE)),
        header(mp3(200)),
        header(bytes(64) + mp3(200)),
        header(bytes(9_000) + b"\x7f\xfe\x80\x01" + bytes(9_000)),
        header(b"\xff\xf1\x50\x80" + bytes(9_000)),
        header(bytes(9_000) + b"fmt " + bytes(9_000)),
        header(bytes(9_000) + b"data" + bytes(9_000)),
        header(b""),
        wav()[:30],
        b"RIFX" + wav()[4:],
        b"OggS" + bytes(9_000),
        b"",
    ],
)
def test_what_a_decoder_could_take_for_more_says_nothing(content: bytes) -> None:
    assert of(content) is None


def test_a_header_that_claims_more_than_there_is_is_taken_at_its_word() -> None:
    assert of(header(bytes(16_000), claimed=16_000 * 1_000)) == 1_000
    fact = b"fact\x04\0\0\0" + struct.pack("<I", 8_000 * 500)
    plain = wav()
    assert of(plain[:36] + fact + plain[36:]) == 500


def test_other_chunks_are_passed_over() -> None:
    plain = wav(3)
    noted = plain[:36] + b"LIST\x05\0\0\0INFOx\0" + plain[36:]
    assert of(noted) == of(plain)


def test_name_and_type_must_say_the_same() -> None:
    assert of(wav(), "a.WAV", "audio/x-wav") == of(wav(), "a.wav", "application/octet-stream") is not None
    for name, kind in (
        ("a.mp3", WAV),
        ("a.mp3", MP3),
        ("a.wav", MP3),
        ("a", WAV),
        ("a.wav", "audio/ogg"),
        ("a.ogg", "application/octet-stream"),
    ):
        assert of(wav(), name, kind) is None


# MP3.


def test_an_mp3_lasts_no_longer_than_the_slowest_there_is() -> None:
    content = mp3(500)
    seconds = of(content, "a.mp3", MP3)
    assert seconds == 36 == -(-500 * 576 // 8_000)
    tagged = b"ID3\x04\0\0\0\0\x01\x00" + bytes(128) + content
    assert of(tagged, "a.mp3", MP3) == 37


def test_the_frames_that_a_header_counts_count() -> None:
    hour = mp3(100, first=b"Xing\0\0\0\x01" + struct.pack(">I", 50_000))
    assert of(hour, "a.mp3", MP3) == 50_000 * 1_152 // 8_000
    assert of(mp3(100, first=b"VBRI"), "a.mp3", MP3) is None


@pytest.mark.parametrize(
    "content",
    [
        mp3(5),
        mp3(100, head=b"\xff\xe3\x08\xc4"),  # free format
        mp3(100, head=b"\xff\xf1\x50\x80"),  # AAC
        mp3(100)[1:],
        b"ID3\x04\0\0\0\0\x01\x00" + bytes(10),
        bytes(9_000),
        b"",
    ],
)
def test_what_does_not_begin_as_an_mp3_says_nothing(content: bytes) -> None:
    assert of(content, "a.mp3", MP3) is None


# In requests.


def transcription(body: bytes, content_type: str = "application/json") -> tuple[int | None, Bound]:
    parsed = read_request(endpoint_of("audio/transcriptions"), body, content_type)
    return parsed.seconds, bound_request(
        "audio/transcriptions", parsed.fields, len(body), INDEX, POLICY, seconds=parsed.seconds
    )


def form(content: bytes, model: str = "scribe/model", name: str = "a.wav") -> bytes:
    part = "--x\r\nContent-Disposition: form-data; name="
    head = f'{part}"model"\r\n\r\n{model}\r\n{part}"file"; '
    return f'{head}filename="{name}"\r\nContent-Type: audio/wav\r\n\r\n'.encode() + content + b"\r\n--x--\r\n"


def as_json(content: bytes, model: str = "scribe/model", form: str = "wav") -> bytes:
    data = base64.b64encode(content).decode()
    return f'{{"model": "{model}", "input_audio": {{"data": "{data}", "format": "{form}"}}}}'.encode()


def test_a_second_of_sound_holds_a_begun_minute_or_its_tokens_not_a_day() -> None:
    for seconds, bound in (
        transcription(form(wav(10)), "multipart/form-data; boundary=x"),
        transcription(as_json(wav(10))),
    ):
        assert seconds == 11  # its header counts as sound
        assert 1_100 * 6_000 < bound.fixed_nanos < 1_700 * 6_000
    _, by_the_second = transcription(as_json(wav(10), "embed/model"))
    _, of_an_hour = transcription(as_json(wav(200), "embed/model"))
    assert by_the_second.fixed_nanos < 1_700 * 20 and of_an_hour.fixed_nanos == 8_000 * 20
    _, long = transcription(as_json(wav(9_000, width=1), "embed/model"))
    assert long.fixed_nanos == 9_060 * 20  # more seconds than its context has tokens


def test_a_known_length_bounds_a_model_without_a_context() -> None:
    model = entry("second/model", "0", "0", pricing={"audio": "0.0001"}, context_length=None, top_provider={})
    index = read_models(json.dumps({"data": [model]}).encode())
    body: dict[str, Any] = {"model": "second/model", "input_audio": {"data": "", "format": "wav"}}
    bound = bound_request("audio/transcriptions", body, 100, index, POLICY, seconds=11)
    assert 1_100 * 100_000 < bound.fixed_nanos < 1_700 * 100_000
    with pytest.raises(UnboundedCost):
        bound_request("audio/transcriptions", body, 100, index, POLICY)


@pytest.mark.parametrize(
    "audio",
    [
        {"data": base64.b64encode(wav()).decode(), "format": "mp3"},
        {"data": base64.b64encode(wav()).decode()},
        {"data": base64.b64encode(wav()).decode(), "format": ["wav"]},
        {"data": "data:audio/wav;base64," + base64.b64encode(wav()).decode(), "format": "wav"},
        {"data": "%", "format": "wav"},
        {"data": "é", "format": "wav"},
        {"data": 5, "format": "wav"},
        {},
    ],
)
def test_audio_that_cannot_be_read_says_nothing(audio: dict[str, Any]) -> None:
    assert seconds_of_audio(audio) is None


@given(
    st.binary(max_size=300),
    st.sampled_from(["a.wav", "a.mp3"]),
    st.sampled_from([b"", wav(0.01), header(b"")[:20], b"ID3\x04", b"\xff\xfb"]),
)
def test_any_bytes_are_survived(content: bytes, name: str, before: bytes) -> None:
    seconds = of(before + content, name, "application/octet-stream")
    assert seconds is None or seconds >= 1
