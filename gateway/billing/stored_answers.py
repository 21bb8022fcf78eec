"""Recording and sealing of answers for replay and cache. Places and fingerprints, the recording of an answer,
and its sealed form.

An answer is kept as the client got it, but for the charge: of `gateway_usage` only the places are kept, and
whoever gives the answer again writes there what holds then. It knows nothing of accounts, and nothing leaves
it unencrypted.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
import structlog

from common.errors import BadRequest
from db_rows.requests import SlotItem
from security import Vault

log = structlog.get_logger("answers")

MAX_ANSWER_BYTES = 1024 * 1024
MAX_KEY_LENGTH = 255
IDEMPOTENCY_SECONDS = 24 * 3600
# Larger ones are compressed and encrypted in a thread: a megabyte takes some 30 ms.
ASIDE_BYTES = 64 * 1024
# Stands where `gateway_usage` stands while an answer is recorded. Nobody outside this process can write it
# into one.
CHARGE_MARK = b'"' + secrets.token_hex(16).encode() + b'"'


@dataclass(frozen=True, slots=True)
class AnswerSlot:
    """Where an answer is kept. `ttl_seconds` None: the API key's own `cache_ttl_seconds`; `clear`: what is
    there is removed first.
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
    """SHA-256 of a raw body, in hex: the same Idempotency-Key with another one is a mistake of the client."""
    return hashlib.sha256(raw).hexdigest()


def idempotency_slot(mode: str, environment: str | None, path: str, key: str, raw: bytes) -> AnswerSlot:
    """The place of an Idempotency-Key on a path, kept for 24 hours. Raises BadRequest for a key that is none.

    Gateway mode and the key's environment are part of it: a sandbox's answer is never given in live mode.
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
    body: Mapping[str, Any],
    vault: Vault,
    *,
    variant: str = "",
    ttl_seconds: int | None = None,
    clear: bool = False,
) -> AnswerSlot:
    """The place of a parsed body in the response cache, whatever the order of its fields; `variant` is what
    else decides the answer.

    Its fingerprint is the key that the answer is sealed with: after a change of ENCRYPTION_KEYS it is
    answered anew.
    """
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
    """What a client is sent, for as long as it is small enough to be kept."""

    _parts: list[bytes] = field(default_factory=list)
    _size: int = 0

    @property
    def is_too_large(self) -> bool:
        return self._size > MAX_ANSWER_BYTES

    def add(self, data: bytes) -> None:
        """Bytes as they are sent; where `gateway_usage` stands, CHARGE_MARK."""
        self._size += len(data)
        if self.is_too_large:
            self._parts.clear()
        else:
            self._parts.append(data)

    def pieces(self) -> tuple[bytes, ...] | None:
        """All of it, parted where the charge stands; None where it is too large to be kept."""
        return None if self.is_too_large else tuple(b"".join(self._parts).split(CHARGE_MARK))


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """An answer as the client got it. `headers`: those that are sent again (content-type, x-generation-id,
    ...).

    `pieces` are the body, parted where `gateway_usage` stands; one piece has none. What was charged is not
    part of it: the books say that.
    """

    status: int
    headers: Mapping[str, str]
    pieces: tuple[bytes, ...]

    def body(self, gateway_usage: bytes) -> bytes:
        """The body with this JSON object as its charge."""
        return gateway_usage.join(self.pieces)

    async def seal(self, vault: Vault) -> str:
        """Compressed and encrypted, as the database keeps it."""
        sealed: str = await _aside(sum(map(len, self.pieces)), self._seal, vault)
        return sealed

    def _seal(self, vault: Vault) -> str:
        head = {"status": self.status, "headers": dict(self.headers), "lengths": list(map(len, self.pieces))}
        return vault.encrypt_bytes(zlib.compress(b"\n".join((orjson.dumps(head), b"".join(self.pieces))), 1))


async def open_answer(sealed: str, vault: Vault) -> StoredAnswer | None:
    """The answer, or None (and a line in the log) where none of our keys made it."""
    found: StoredAnswer | None = await _aside(len(sealed), _open, sealed, vault)
    if found is None:
        log.warning("stored_answer_unreadable", action="was a key removed from ENCRYPTION_KEYS?")
    return found


def _open(sealed: str, vault: Vault) -> StoredAnswer | None:
    packed = vault.decrypt_bytes(sealed)
    if packed is None:
        return None
    about, _, body = zlib.decompress(packed).partition(b"\n")
    head = orjson.loads(about)
    pieces, start = [], 0
    for length in head["lengths"]:
        pieces.append(body[start : start + length])
        start += length
    return StoredAnswer(head["status"], head["headers"], tuple(pieces))


async def _aside(size: int, work: Any, *arguments: Any) -> Any:
    return work(*arguments) if size <= ASIDE_BYTES else await asyncio.to_thread(work, *arguments)
