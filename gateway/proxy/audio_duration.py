"""An upper bound of a recording's length, read from its bytes. Where another reader could take the recording
for longer, its length must count as unknown.

A header is the client's own word, so it counts only where every reader must agree with it, and then the
longest reading counts:

- WAV of plain samples (PCM, float, A-law, mu-law), whose header agrees with itself: decoders play samples of
  this size at this rate, and nothing else can be in it. The whole file is counted as samples, or the length
  that the header claims, if that is more: a tool may believe it. The length of compressed WAV (ADPCM, GSM,
  MP3) is unknown. A header that claims a high rate over compressed bytes makes noise of its length, except
  for decoders that look for a coded stream in 16-bit samples (ffmpeg does, for DTS on CDs): the length of
  samples that begin like one, or hold the words of DTS, is unknown.
- MP3 that begins with consecutive frames: no frame has less than 8 kbit/s (ISO 11172-3, 13818-3), or the
  frames that a header counts.
- Both only where name and type say the same, since the provider's decoder may go by those.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Iterator, Mapping

from common.json_types import JsonObject

# Bits of a sample by format tag: PCM, IEEE float, A-law, mu-law.
SAMPLES = {1: (8, 16, 24, 32), 3: (32, 64), 6: (8,), 7: (8,)}
EXTENSIBLE, EXTENSION = 0xFFFE, bytes.fromhex("000000001000800000aa00389b71")
RATES = range(8_000, 192_001)
MAX_CHUNKS = 64
# The beginnings of coded streams (MPEG audio and AAC, LATM, AC-3), and the words of DTS in any of its orders.
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
FRAMES = 8  # in a row: no reader takes such a file for something else
# kbit/s of layer III, in MPEG-1 (True) or at its halved rates; 0: free format, whose frames have no known
# length.
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
    """The whole seconds that a file lasts at most, None where they are unknown."""
    kind = name.rpartition(".")[2].lower()
    if content_type != ANY_TYPE and content_type not in KINDS.get(kind, ()):
        return None
    return _seconds(content, kind)


def seconds_of_audio(audio: JsonObject) -> int | None:
    """The same for an `input_audio` object, whose `data` is base64."""
    data, kind = audio.get("data"), audio.get("format")
    if not isinstance(kind, str) or not isinstance(data, str):
        return None
    try:
        return _seconds(base64.b64decode(data, validate=True), kind)
    except (binascii.Error, ValueError):
        return None


def _seconds(content: bytes, kind: str) -> int | None:
    if kind == "wav":
        return _wave_seconds(content)
    return _mp3_seconds(content) if kind == "mp3" else None


# WAV: https://www.mmsp.ece.mcgill.ca/Documents/AudioFormats/WAVE/WAVE.html


def _wave_seconds(content: bytes) -> int | None:
    is_wave = content[:4] == b"RIFF" and content[8:16] == b"WAVEfmt "
    # A second chunk of either name would be another reader's choice.
    if not is_wave or any(content.count(name) != 1 for name in (b"fmt ", b"data")):
        return None
    chunks = dict(_chunks(content))
    sample_rate = _sample_rate(content, chunks[b"fmt "][0])
    if sample_rate is None or b"data" not in chunks:
        return None
    (bytes_per_second, width), (start, claimed) = sample_rate, chunks[b"data"]
    if width == 2 and _looks_coded(content, start):
        return None
    seconds = -(-max(len(content), claimed) // bytes_per_second)
    return max(seconds, _counted_seconds(content, chunks))


def _counted_seconds(content: bytes, chunks: Mapping[bytes, tuple[int, int]]) -> int:
    """The seconds of the samples that a `fact` chunk counts, at the lowest rate; 0 without one."""
    if b"fact" not in chunks or chunks[b"fact"][0] + 4 > len(content):
        return 0
    (samples,) = struct.unpack_from("<I", content, chunks[b"fact"][0])
    return -(-int(samples) // RATES.start)


def _chunks(content: bytes) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The name, offset and claimed size of each chunk, up to the samples."""
    offset = 12
    for _ in range(MAX_CHUNKS):
        if offset + 8 > len(content):
            return
        name, (size,) = content[offset : offset + 4], struct.unpack_from("<I", content, offset + 4)
        yield name, (offset + 8, size)
        if name == b"data":
            return
        offset += 8 + size + size % 2


def _sample_rate(content: bytes, offset: int) -> tuple[int, int] | None:
    """Bytes in a second and in a sample, where the `fmt ` chunk is consistent and names plain samples."""
    if offset + 40 > len(content):
        return None
    tag, channels, rate, per_second, block, bits = struct.unpack_from("<HHIIHH", content, offset)
    if tag == EXTENSIBLE and content[offset + 26 : offset + 40] == EXTENSION:
        (tag,) = struct.unpack_from("<H", content, offset + 24)
    is_plain = bits in SAMPLES.get(tag, ()) and 1 <= channels <= 8 and rate in RATES
    agrees = block == channels * bits // 8 and per_second == rate * block
    return (per_second, bits // 8) if is_plain and agrees else None


def _looks_coded(content: bytes, start: int) -> bool:
    samples = re.compile(rb"[^\x00]").search(content, start)
    begins = samples is not None and SYNC.match(content, samples.start()) is not None
    return begins or any(word in content for word in DTS)


# MP3: ISO 11172-3, 13818-3.


def _mp3_seconds(content: bytes) -> int | None:
    start = offset = _after_tag(content)
    first = _frame(content, start)
    if first is None:
        return None
    for _ in range(FRAMES):
        frame = _frame(content, offset)
        if frame is None:
            return None
        offset += frame[0]
    length, samples_per_second = first
    head = content[start : start + length]
    if b"VBRI" in head:  # a header with counts of its own, which nobody here reads
        return None
    counted = -(-_counted_frames(head) * LONGEST_FRAME // samples_per_second)
    return max(-(-len(content) // MP3_BYTES_PER_SECOND), counted)


def _counted_frames(head: bytes) -> int:
    """The frames that a Xing or Info header in the first frame counts; 0 without one."""
    offset = next((head.find(name) for name in (b"Xing", b"Info") if name in head), -1)
    has_count = offset >= 0 and len(head) >= offset + 12 and head[offset + 7] & 1
    return int(struct.unpack_from(">I", head, offset + 8)[0]) if has_count else 0


def _after_tag(content: bytes) -> int:
    """The offset of the first frame: after an ID3v2 tag (https://id3.org/id3v2.4.0-structure), or 0."""
    if content[:3] != b"ID3" or len(content) < 10:
        return 0
    return 10 + sum((byte & 127) << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0), strict=True))


def _frame(content: bytes, offset: int) -> tuple[int, int] | None:
    """Bytes and samples per second of the layer III frame that begins here, None where none does."""
    if offset + 4 > len(content):
        return None
    (header,) = struct.unpack_from(">I", content, offset)
    version, bitrate, rate = header >> 19 & 3, header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or header >> 17 & 3 != 1 or version == 1 or bitrate in (0, 15) or rate == 3:
        return None
    frequency, kbits = SAMPLE_RATES[version][rate], BITRATES[version == 3][bitrate]
    padding = header >> 9 & 1
    return (144 if version == 3 else 72) * kbits * 1_000 // frequency + padding, frequency
