"""Claims due deliveries and sends them, again and again until they arrive or are given up.

They are signed by the Standard Webhooks specification (https://www.standardwebhooks.com). The database knows
what is due. Any instance may send it, under a lease: no two send one delivery at a time, and a crash only
delays it. The body of a receiver's answer is never read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing

import orjson
import structlog

from common.money import credits_from_nanos, plain
from db_rows.accounts import BudgetEvent, ClaimedDelivery, DeliveryAttempt, DeliveryFinish
from gateway.webhooks.sender import AT_ONCE, GONE, Attempt, Sender
from gateway.webhooks.signature import signature

log = structlog.get_logger("webhooks")
# A whole batch, eight at once and ten seconds each, takes at most 40 seconds: no lease ends while its
# delivery is being sent.
BATCH = 32
LEASE_SECONDS = 90
RETRY_SECONDS = (60, 300, 1800, 7200, 43200)  # after the first, second, ... failure; then it is given up
THRESHOLD_REACHED = "budget.threshold_reached"
TEST = "webhook.test"
Claim = Callable[[int | None], Awaitable[Sequence[ClaimedDelivery]]]
Finish = Callable[[DeliveryAttempt], Awaitable[DeliveryFinish]]


def payload_of(delivery: ClaimedDelivery) -> bytes:
    """The body of a delivery: type, time and data of its event. The same bytes at each attempt."""
    event = delivery["event"]
    if event is None:
        return _payload(TEST, delivery["created_at"], {"webhook_id": delivery["webhook_id"]})
    return _payload(THRESHOLD_REACHED, event["created_at"], _event_data(event))


def _payload(kind: str, timestamp: str, data: Mapping[str, object]) -> bytes:
    return orjson.dumps({"type": kind, "timestamp": timestamp, "data": data})


def _event_data(event: BudgetEvent) -> dict[str, object]:
    start = event["window_start"]
    subject = {"key_id": event["key_id"]} if event["key_id"] is not None else {"end_user": event["end_user"]}
    return {
        "event_id": event["id"],
        "level": event["level"],
        "budget": _amount(event["budget_nanos"]),
        "spent": _amount(event["spent_nanos"]),
        "window": event["budget_window"],
        "window_start": None if start == "-infinity" else start,
        **subject,
        "request_id": event["request_id"],
    }


def _amount(nanos: int) -> orjson.Fragment:
    # Money is written digit by digit: a float could not hold it.
    return orjson.Fragment(plain(credits_from_nanos(nanos)))


class Deliveries:
    """Sends what is due. `claim` leases due deliveries, or only the one that is named; `finish` notes what
    became of an attempt.
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

    async def _send_all(self, sender: Sender, due: Sequence[ClaimedDelivery]) -> int:
        gate = asyncio.Semaphore(AT_ONCE)

        async def send_in_turn(delivery: ClaimedDelivery) -> bool:
            async with gate:
                return await self._send(sender, delivery)

        # All of them end before one raises: those that were not noted are due again when the lease ends.
        results = await asyncio.gather(*map(send_in_turn, due), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return sum(result is True for result in results)

    async def _send(self, sender: Sender, delivery: ClaimedDelivery) -> bool:
        attempt = await self._attempt(sender, delivery)
        await self._finish(_report(delivery, attempt))
        if not attempt.delivered:
            log.info(
                "webhook_not_delivered",
                delivery_id=delivery["id"],
                attempt=delivery["attempts"],
                reason=attempt.error,
            )
        return attempt.delivered

    async def _attempt(self, sender: Sender, delivery: ClaimedDelivery) -> Attempt:
        secrets = self._signing_secrets(delivery)
        if not secrets:
            action = "put back the encryption key"
            log.error("webhook_secret_unreadable", webhook_id=delivery["webhook_id"], action=action)
            return Attempt(None, "the gateway cannot read this webhook's secret; rotate it")
        # The id is the same at each attempt, so that a receiver can tell a repetition; the time is not.
        payload, message_id, now = payload_of(delivery), f"msg_{delivery['id']}", int(time.time())
        headers = {
            "content-type": "application/json",
            "user-agent": "ai-gateway-webhooks",
            "webhook-id": message_id,
            "webhook-timestamp": str(now),
            "webhook-signature": " ".join(signature(secret, message_id, now, payload) for secret in secrets),
        }
        return await sender.post(delivery["url"], payload, headers)

    def _signing_secrets(self, delivery: ClaimedDelivery) -> list[str]:
        """The webhook's secret and, in its grace period, the one before it."""
        tokens = (delivery["encrypted_secret"], delivery["previous_encrypted_secret"])
        decrypted = (self._decrypt(token) for token in tokens if token is not None)
        return [secret for secret in decrypted if secret is not None]


def _report(delivery: ClaimedDelivery, attempt: Attempt) -> DeliveryAttempt:
    count = delivery["attempts"]
    return {
        "id": delivery["id"],
        "attempt": count,
        "status": attempt.status,
        "error": attempt.error,
        "delivered": attempt.delivered,
        "gone": attempt.status == GONE,
        "retry_seconds": RETRY_SECONDS[count - 1] if count <= len(RETRY_SECONDS) else None,
    }
