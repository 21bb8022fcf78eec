"""Answers that are stored to be sent again: the slot of an idempotency key or of the response cache, the
recording of an answer, and its sealed form.

An answer is stored as the client got it, except for its charge: of `gateway_usage` only the position is
stored, and whoever sends the answer again writes the charge of that moment there. Nothing is stored
unencrypted.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import orjson
import structlog

from common.errors import BadRequest
from common.json_types import JsonObject
from db_rows.requests import SlotItem
from security import Vault

log = structlog.get_logger("answers")

MAX_ANSWER_BYTES = 1024 * 1024
MAX_KEY_LENGTH = 255
IDEMPOTENCY_SECONDS = 24 * 3600
# Larger ones are compressed and encrypted in a thread: a megabyte takes some 30 ms.
THREAD_BYTES = 64 * 1024
# Marks the position of `gateway_usage` while an answer is recorded. It is random, so that no model and no
# client can write it into an answer.
CHARGE_MARK = b'"' + secrets.token_hex(16).encode() + b'"'


@dataclass(frozen=True, slots=True)
class AnswerSlot:
    """Where an answer is stored. Without `ttl_seconds` the API key's own `cache_ttl_seconds` applies; `clear`
    removes the answer that is there first.
    """

    place: str
    fingerprint: str
    ttl_seconds: int | None = None
    clear: bool = False

    def item(self) -> SlotItem:
        """The field of an admission item."""
        item: SlotItem = {"place": self.place, "fingerprint": self.fingerprint}
        if self.ttl_seconds is not None:
            item["ttl_seconds"] = self.ttl_seconds
        if self.clear:
            item["clear"] = True
        return item


def fingerprint(raw: bytes) -> str:
    """SHA-256 of a raw body, in hex: the same Idempotency-Key with another body is a client's mistake."""
    return hashlib.sha256(raw).hexdigest()


def idempotency_slot(mode: str, environment: str | None, path: str, key: str, raw: bytes) -> AnswerSlot:
    """The slot of an Idempotency-Key on a path, for 24 hours. Raises BadRequest for an unusable key.

    The gateway's mode and the key's environment are part of it: a sandbox's answer is never sent in live
    mode.
    """
    if not 1 <= len(key) <= MAX_KEY_LENGTH or not key.isprintable():
        raise BadRequest(
            f"`Idempotency-Key` is 1 to {MAX_KEY_LENGTH} printable characters.", param="Idempotency-Key"
        )
    return AnswerSlot(
        _digest("idempotency", mode, environment, path, key.encode()), fingerprint(raw), IDEMPOTENCY_SECONDS
    )


def cache_slot(
    mode: str,
    environment: str | None,
    path: str,
    body: JsonObject,
    vault: Vault,
    *,
    variant: str = "",
    ttl_seconds: int | None = None,
    clear: bool = False,
) -> AnswerSlot:
    """The slot of a parsed body in the response cache, whatever the order of its fields. `variant` is what
    else decides the answer.

    The fingerprint names the key that seals the answer: after a change of ENCRYPTION_KEYS it is generated
    anew.
    """
    # Clients write the same fields in any order.
    canonical = orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
    return AnswerSlot(
        _digest("cache", mode, environment, path + "\0" + variant, canonical),
        vault.current_id,
        ttl_seconds,
        clear,
    )


def _digest(kind: str, mode: str, environment: str | None, path: str, rest: bytes) -> str:
    return hashlib.sha256(f"{kind}\0{mode}\0{environment or ''}\0{path}\0".encode() + rest).hexdigest()


@dataclass(slots=True)
class Recording:
    """What a client is sent, for as long as it is small enough to be stored."""

    _parts: list[bytes] = field(default_factory=list)
    _size: int = 0

    @property
    def is_too_large(self) -> bool:
        return self._size > MAX_ANSWER_BYTES

    def add(self, data: bytes) -> None:
        """Bytes as they are sent, with CHARGE_MARK in the position of `gateway_usage`."""
        self._size += len(data)
        if self.is_too_large:
            # Given up for good: what was recorded must not stay in memory for the rest of a long stream.
            self._parts.clear()
        else:
            self._parts.append(data)

    def pieces(self) -> tuple[bytes, ...] | None:
        """The body, split at the charge; None where it is too large to be stored."""
        return None if self.is_too_large else tuple(b"".join(self._parts).split(CHARGE_MARK))


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """An answer as the client got it. `headers` are those that are sent again (content-type,
    x-generation-id).

    `pieces` are the body, split where `gateway_usage` goes; a body in one piece has none. The charge is not
    part of it: the books have that.
    """

    status: int
    headers: Mapping[str, str]
    pieces: tuple[bytes, ...]

    def body(self, gateway_usage: bytes) -> bytes:
        """The body with this JSON object as its charge."""
        return gateway_usage.join(self.pieces)

    async def seal(self, vault: Vault) -> str:
        """Compressed and encrypted, as the database stores it."""
        return await _in_thread_if_large(sum(map(len, self.pieces)), lambda: self._seal(vault))

    def _seal(self, vault: Vault) -> str:
        head = {"status": self.status, "headers": dict(self.headers), "lengths": list(map(len, self.pieces))}
        # The fastest level: the client's last bytes wait for it.
        return vault.encrypt_bytes(zlib.compress(b"\n".join((orjson.dumps(head), b"".join(self.pieces))), 1))


async def open_answer(sealed: str, vault: Vault) -> StoredAnswer | None:
    """The answer, or None (and a line in the log) where none of our keys sealed it."""
    answer = await _in_thread_if_large(len(sealed), lambda: _open(sealed, vault))
    if answer is None:
        log.warning("stored_answer_unreadable", action="was a key removed from ENCRYPTION_KEYS?")
    return answer


def _open(sealed: str, vault: Vault) -> StoredAnswer | None:
    packed = vault.decrypt_bytes(sealed)
    if packed is None:
        return None
    first_line, _, body = zlib.decompress(packed).partition(b"\n")
    head = orjson.loads(first_line)
    pieces, start = [], 0
    for length in head["lengths"]:
        pieces.append(body[start : start + length])
        start += length
    return StoredAnswer(head["status"], head["headers"], tuple(pieces))


T = TypeVar("T")


async def _in_thread_if_large(size: int, work: Callable[[], T]) -> T:
    # The loop serves streams meanwhile, and a thread costs more than sealing a small answer.
    return work() if size <= THREAD_BYTES else await asyncio.to_thread(work)
