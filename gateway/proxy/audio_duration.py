"""An upper bound of a recording's length. As its bytes say, where no reader can take them for more; else
nothing is said.

A header is the client's own word, so it counts only where every reader must agree with it, and then the
longest reading counts:

- WAV of plain samples (PCM, float, A-law, mu-law), whose header agrees with itself: decoders play samples of this size at this rate,
  and nothing else can be in it. The whole file is counted as samples, or what the header claims, if that is more: a tool may believe
  it. Compressed WAV (ADPCM, GSM, MP3) says nothing. A header that claims a high rate over compressed bytes makes noise of its
  length, but for decoders that look for a coded stream in 16-bit samples (ffmpeg does, for DTS on CDs): samples that begin like one,
  or hold the words of DTS, say nothing.
- MP3 that begins with consecutive frames: no frame has less than 8 kbit/s (ISO 11172-3, 13818-3), or the frames that a header counts.
- Both only where name and type say the same, since the provider's decoder may go by those.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

SAMPLES = {
    1: (8, 16, 24, 32),
    3: (32, 64),
    6: (8,),
    7: (8,),
}  # bits by format tag: PCM, IEEE float, A-law, mu-law
EXTENSIBLE, EXTENSION = 0xFFFE, bytes.fromhex("000000001000800000aa00389b71")
RATES = range(8_000, 192_001)
MAX_CHUNKS = 64
# MPEG audio and AAC, LATM, AC-3: what a coded stream begins with; the words of DTS, in any of its orders.
SYNC = re.compile(rb"\xff[\xe0-\xff]|\x56[\xe0-\xff]|\x0b\x77|\x77\x0b")
DTS = (
    b"\x7f\xfe\x80\x01",
    b"\xfe\x7f\x01\x80",
    b"\x1f\xff\xe8\x00",
    b"\xff\x1f\x00\xe8",
    b"\x64\x58\x20\x25",
    b"\x58\x64\x25\x20",
)

MP3_BYTES_PER_SECOND = 1_000
FRAMES = 8  # in a row, so that nobody takes the file for something else
# kbit/s of layer III, by MPEG-1 or its halved rates; 0: free format, which says nothing.
BITRATES = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SAMPLE_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
LONGEST_FRAME = 1_152  # samples

KINDS = {
    "wav": frozenset(("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave")),
    "mp3": frozenset(("audio/mpeg", "audio/mp3")),
}
ANY_TYPE = "application/octet-stream"


def seconds_of_file(content: bytes, name: str, content_type: str) -> int | None:
    """Whole seconds that a file lasts at most, None where it does not say so."""
    kind = name.rpartition(".")[2].lower()
    return (
        _seconds(content, kind) if content_type in KINDS.get(kind, ()) or content_type == ANY_TYPE else None
    )


def seconds_of_audio(audio: Mapping[str, Any]) -> int | None:
    """The same for an `input_audio` object, whose `data` is base64."""
    data, kind = audio.get("data"), audio.get("format")
    if not isinstance(kind, str) or not isinstance(data, str):
        return None
    try:
        return _seconds(base64.b64decode(data, validate=True), kind)
    except (binascii.Error, ValueError):
        return None


def _seconds(content: bytes, kind: str) -> int | None:
    return _of_wave(content) if kind == "wav" else _of_mp3(content) if kind == "mp3" else None


def _of_wave(content: bytes) -> int | None:
    if (
        content[:4] != b"RIFF"
        or content[8:16] != b"WAVEfmt "
        or any(content.count(name) != 1 for name in (b"fmt ", b"data"))
    ):
        return None
    chunks = dict(_chunks(content))
    rate = _sample_rate(content, chunks[b"fmt "][0])
    if rate is None or b"data" not in chunks:
        return None
    (per_second, width), (start, claimed) = rate, chunks[b"data"]
    if width == 2 and _looks_coded(content, start):
        return None
    seconds = -(-max(len(content), claimed) // per_second)
    if b"fact" in chunks and chunks[b"fact"][0] + 4 <= len(content):
        (samples,) = struct.unpack_from("<I", content, chunks[b"fact"][0])
        seconds = max(seconds, -(-samples // RATES.start))
    return seconds


def _chunks(content: bytes) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The name, place and claimed size of each chunk, up to the samples."""
    place = 12
    for _ in range(MAX_CHUNKS):
        if place + 8 > len(content):
            return
        name, (size,) = content[place : place + 4], struct.unpack_from("<I", content, place + 4)
        yield name, (place + 8, size)
        if name == b"data":
            return
        place += 8 + size + size % 2


def _sample_rate(content: bytes, place: int) -> tuple[int, int] | None:
    """Bytes in a second and in a sample, where the `fmt ` chunk agrees with itself and with what there is."""
    if place + 40 > len(content):
        return None
    tag, channels, rate, per_second, block, bits = struct.unpack_from("<HHIIHH", content, place)
    if tag == EXTENSIBLE and content[place + 26 : place + 40] == EXTENSION:
        (tag,) = struct.unpack_from("<H", content, place + 24)
    plain = bits in SAMPLES.get(tag, ()) and 1 <= channels <= 8 and rate in RATES
    return (
        (per_second, bits // 8)
        if plain and block == channels * bits // 8 and per_second == rate * block
        else None
    )


def _looks_coded(content: bytes, start: int) -> bool:
    samples = re.compile(rb"[^\x00]").search(content, start)
    begins = samples is not None and SYNC.match(content, samples.start()) is not None
    return begins or any(word in content for word in DTS)


def _of_mp3(content: bytes) -> int | None:
    place = _after_tag(content)
    first = _frame(content, place)
    if first is None:
        return None
    for _ in range(FRAMES):
        frame = _frame(content, place)
        if frame is None:
            return None
        place += frame[0]
    head = content[_after_tag(content) :][: first[0]]
    if b"VBRI" in head:
        return None
    counted = next((head.find(name) for name in (b"Xing", b"Info") if name in head), -1)
    frames = (
        struct.unpack_from(">I", head, counted + 8)[0]
        if counted >= 0 and len(head) >= counted + 12 and head[counted + 7] & 1
        else 0
    )
    return max(-(-len(content) // MP3_BYTES_PER_SECOND), -(-frames * LONGEST_FRAME // first[1]))


def _after_tag(content: bytes) -> int:
    """Where the first frame stands: after an ID3v2 tag (https://id3.org/id3v2.4.0-structure), or at the
    start.
    """
    if content[:3] != b"ID3" or len(content) < 10:
        return 0
    return 10 + sum((byte & 127) << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0), strict=True))


def _frame(content: bytes, place: int) -> tuple[int, int] | None:
    """Bytes and samples per second of the layer III frame that begins here."""
    if place + 4 > len(content):
        return None
    (header,) = struct.unpack_from(">I", content, place)
    version, bitrate, rate = header >> 19 & 3, header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or header >> 17 & 3 != 1 or version == 1 or bitrate in (0, 15) or rate == 3:
        return None
    frequency, kbits = SAMPLE_RATES[version][rate], BITRATES[version == 3][bitrate]
    return (144 if version == 3 else 72) * kbits * 1_000 // frequency + (header >> 9 & 1), frequency
