"""Claims due deliveries and sends them until they arrive. Signed deliveries of events to their webhooks,
again and again until they arrive or are given up.

Signed by the Standard Webhooks specification (https://www.standardwebhooks.com). What is due stands in the
database; any instance may send it, under a lease, so that two never send one delivery at a time and a crash
only delays it. An answer's body is never read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import orjson
import structlog

from common.money import credits_from_nanos, plain
from gateway.webhooks.sender import AT_ONCE, GONE, Attempt, Sender
from gateway.webhooks.signature import signature

log = structlog.get_logger("webhooks")
LEASE_SECONDS = 90
RETRY_SECONDS = (60, 300, 1800, 7200, 43200)
BATCH = 32
THRESHOLD_REACHED = "budget.threshold_reached"
TEST = "webhook.test"
Row = dict[str, Any]
Claim = Callable[[int | None], Awaitable[Sequence[Row]]]
Finish = Callable[[Mapping[str, Any]], Awaitable[Any]]


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


class Deliveries:
    """Sends what is due. `claim` leases due deliveries (or the one that is named), `finish` says what became
    of them.
    """

    def __init__(
        self,
        claim: Claim,
        finish: Finish,
        *,
        decrypt: Callable[[str], str | None],
        open_sender: Callable[[], Sender] = Sender,
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
            if isinstance(
                outcome, BaseException
            ):  # all have ended; those that were not noted are due again when the lease ends
                raise outcome
        return sum(outcome is True for outcome in found)

    async def _send(self, sender: Sender, delivery: Row) -> bool:
        attempt = await self._attempt(sender, delivery)
        retry = (
            RETRY_SECONDS[delivery["attempts"] - 1] if delivery["attempts"] <= len(RETRY_SECONDS) else None
        )
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
            log.info(
                "webhook_not_delivered",
                delivery_id=delivery["id"],
                attempt=delivery["attempts"],
                reason=attempt.error,
            )
        return attempt.delivered

    async def _attempt(self, sender: Sender, delivery: Row) -> Attempt:
        tokens = [delivery["encrypted_secret"], delivery["previous_encrypted_secret"]]
        keys = [
            secret for token in tokens if token is not None and (secret := self._decrypt(token)) is not None
        ]
        if not keys:
            log.error(
                "webhook_secret_unreadable",
                webhook_id=delivery["webhook_id"],
                action="put back the encryption key",
            )
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
