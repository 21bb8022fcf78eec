"""How do users learn what happened? Signed deliveries of events to their webhooks, again and again until they arrive or are given up.

Signed by the Standard Webhooks specification (https://www.standardwebhooks.com). What is due stands in the database; any instance may
send it, under a lease, so that two never send one delivery at a time and a crash only delays it. An answer's body is never read.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import aiohttp
import orjson
import structlog
from aiohttp.connector import AddrInfoType
from yarl import URL

from destinations import Address, CheckedResolver, Lookup, NotPublic, is_public, literal, look_up
from money import credits_from_nanos, plain

log = structlog.get_logger("webhooks")

PREFIX = "whsec_"
SECRET_BYTES = 32
SEND_SECONDS = 10.0
LEASE_SECONDS = 90
RETRY_SECONDS = (60, 300, 1800, 7200, 43200)
BATCH = 32
AT_ONCE = 8
GONE = 410
THRESHOLD_REACHED = "budget.threshold_reached"
TEST = "webhook.test"

TROUBLES: dict[type[Exception], str] = {
    aiohttp.ClientConnectorDNSError: "the host's name cannot be resolved",
    aiohttp.ClientSSLError: "the TLS handshake failed: is the certificate valid?",
    aiohttp.ClientConnectorError: "the connection could not be made",
    aiohttp.InvalidURL: "the URL cannot be used",
}

Row = dict[str, Any]
Claim = Callable[[int | None], Awaitable[Sequence[Row]]]
Finish = Callable[[Mapping[str, Any]], Awaitable[Any]]


def new_secret() -> str:
    """A fresh signing secret: `whsec_` and 32 random bytes in base64."""
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def signature(secret: str, message_id: str, timestamp: int, payload: bytes) -> str:
    """`v1,` and the HMAC-SHA256 of id, time and payload, in base64."""
    key = base64.b64decode(secret.removeprefix(PREFIX))
    signed = f"{message_id}.{timestamp}.".encode() + payload
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def payload_of(delivery: Mapping[str, Any]) -> bytes:
    """The body of a delivery: type, time and data of its event. The same bytes at each attempt."""
    event = delivery["event"]
    if event is None:
        data: dict[str, Any] = {"webhook_id": delivery["webhook_id"]}
        return orjson.dumps({"type": TEST, "timestamp": delivery["created_at"], "data": data})
    subject = {"key_id": event["key_id"]} if event["key_id"] is not None else {"end_user": event["end_user"]}
    data = {
        "event_id": event["id"],
        "level": event["level"],
        "budget": orjson.Fragment(plain(credits_from_nanos(event["budget_nanos"]))),
        "spent": orjson.Fragment(plain(credits_from_nanos(event["spent_nanos"]))),
        "window": event["budget_window"],
        "window_start": None if event["window_start"] == "-infinity" else event["window_start"],
        **subject,
        "request_id": event["request_id"],
    }
    return orjson.dumps({"type": THRESHOLD_REACHED, "timestamp": event["created_at"], "data": data})


@dataclass(frozen=True, slots=True)
class Attempt:
    """What became of one attempt: the status that was answered, or why there is none."""

    status: int | None
    error: str | None

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class Sender:
    """POSTs to users' URLs. `look_up` and `may_reach` decide which addresses a name has and which of them may be connected to."""

    def __init__(
        self,
        *,
        look_up: Lookup = look_up,
        may_reach: Callable[[Address], bool] = is_public,
        tls: ssl.SSLContext | None = None,
        seconds: float = SEND_SECONDS,
    ) -> None:
        self._resolver = CheckedResolver(look_up, may_reach)
        connector = aiohttp.TCPConnector(
            resolver=self._resolver,
            socket_factory=self._open_socket,
            use_dns_cache=False,
            force_close=True,
            ssl=tls or True,
            limit=AT_ONCE,
        )
        timeout = aiohttp.ClientTimeout(total=seconds)
        jar = aiohttp.DummyCookieJar()
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, cookie_jar=jar, auto_decompress=False)

    async def post(self, url: str, payload: bytes, headers: Mapping[str, str]) -> Attempt:
        """Sends once. Follows no redirect and reads no body."""
        target = URL(url)
        try:
            if (address := literal(target.host or "")) is not None:  # which no resolver is asked for
                self._resolver.check(address)
            async with self._session.post(target, data=payload, headers=headers, allow_redirects=False) as answer:
                # Leaving without reading closes the connection, whatever is still to come.
                return Attempt(answer.status, None if 200 <= answer.status < 300 else _reason(answer.status))
        except TimeoutError:
            return Attempt(None, "no answer in time")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Attempt(None, _trouble(error))

    def _open_socket(self, info: AddrInfoType) -> socket.socket:
        """The last check, of the very address that is connected to."""
        family, kind, protocol, _, target = info
        self._resolver.check(ip_address(str(target[0])))
        return socket.socket(family, kind, protocol)

    async def aclose(self) -> None:
        await self._session.close()


def _reason(status: int) -> str:
    return f"redirects are not followed (status {status})" if 300 <= status < 400 else f"the receiver answered with status {status}"


def _trouble(error: Exception) -> str:
    """What to tell the user: nothing of our network."""
    for cause in (error, error.__cause__, getattr(error, "os_error", None)):
        if isinstance(cause, NotPublic):
            return str(cause)
    for kind, told in TROUBLES.items():
        if isinstance(error, kind):
            return told
    return "the connection broke"


class Deliveries:
    """Sends what is due. `claim` leases due deliveries (or the one that is named), `finish` says what became of them."""

    def __init__(
        self, claim: Claim, finish: Finish, *, decrypt: Callable[[str], str | None], open_sender: Callable[[], Sender] = Sender
    ) -> None:
        self._claim = claim
        self._finish = finish
        self._decrypt = decrypt
        self._open_sender = open_sender

    async def deliver_due(self, *, seconds: float = 30.0, delivery_id: int | None = None) -> int:
        """Sends what is due, for about this long; returns how many arrived."""
        started = time.monotonic()
        arrived = 0
        while due := await self._claim(delivery_id):
            async with aclosing(self._open_sender()) as sender:
                arrived += await self._send_all(sender, due)
            if delivery_id is not None or time.monotonic() - started > seconds:
                break
        return arrived

    async def _send_all(self, sender: Sender, due: Sequence[Row]) -> int:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(delivery: Row) -> bool:
            async with gate:
                return await self._send(sender, delivery)

        found = await asyncio.gather(*(one(delivery) for delivery in due), return_exceptions=True)
        for outcome in found:
            if isinstance(outcome, BaseException):  # all have ended; those that were not noted are due again when the lease ends
                raise outcome
        return sum(outcome is True for outcome in found)

    async def _send(self, sender: Sender, delivery: Row) -> bool:
        attempt = await self._attempt(sender, delivery)
        retry = RETRY_SECONDS[delivery["attempts"] - 1] if delivery["attempts"] <= len(RETRY_SECONDS) else None
        await self._finish(
            {
                "id": delivery["id"],
                "attempt": delivery["attempts"],
                "status": attempt.status,
                "error": attempt.error,
                "delivered": attempt.delivered,
                "gone": attempt.status == GONE,
                "retry_seconds": retry,
            }
        )
        if not attempt.delivered:
            log.info("webhook_not_delivered", delivery_id=delivery["id"], attempt=delivery["attempts"], reason=attempt.error)
        return attempt.delivered

    async def _attempt(self, sender: Sender, delivery: Row) -> Attempt:
        tokens = [delivery["encrypted_secret"], delivery["previous_encrypted_secret"]]
        keys = [secret for token in tokens if token is not None and (secret := self._decrypt(token)) is not None]
        if not keys:
            log.error("webhook_secret_unreadable", webhook_id=delivery["webhook_id"], action="put back the encryption key")
            return Attempt(None, "the gateway cannot read this webhook's secret; rotate it")
        payload, message_id, now = payload_of(delivery), f"msg_{delivery['id']}", int(time.time())
        headers = {
            "content-type": "application/json",
            "user-agent": "ai-gateway-webhooks",
            "webhook-id": message_id,
            "webhook-timestamp": str(now),
            "webhook-signature": " ".join(signature(secret, message_id, now, payload) for secret in keys),
        }
        return await sender.post(delivery["url"], payload, headers)
