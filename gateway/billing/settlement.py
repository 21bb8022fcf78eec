"""Settlements: charges a request exactly once, retries, looks up late costs. Settles, tries again, asks the
upstream what it cost.

A settlement that the database did not take is kept: retried with backoff and, where there is a disk, written
to a journal that the next start reads. It is idempotent per request, so doing it twice is harmless; the hold
protects the money meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import structlog

from common.errors import GatewayError, UpstreamUnavailable
from gateway.billing.group_commit import GroupCommit
from gateway.billing.journal import Item, Journal
from gateway.upstream.client import Upstream
from gateway.upstream.usage import Usage, read_generation

log = structlog.get_logger("settlements")
Answer = dict[str, Any]
QUICK_LOOKUPS = (0.0, 0.25, 0.5, 1.0)
QUICK_LOOKUP_SECONDS = 5.0
PATIENT_LOOKUPS = (2.0, 4.0, 8.0, 16.0, 30.0, 60.0, 60.0, 120.0, 120.0)
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SWEEP_BATCH = 64


def settlement(request_id: str, status: str, source: str, usage: Usage, **rest: Any) -> Item:
    """A settlement item: what the database is told about the end of a request. No known cost is a cost of
    zero, source `none`.

    `stored_answer` (sealed) is kept for the request's idempotency key, and, where it completed, at `cache` (a
    Hold's). Without one the idempotency key is free again if nothing was charged, and else refuses a second
    run.
    """
    return {
        "request_id": request_id,
        "status": status,
        "source": source,
        "billable_nanos": usage.billable_nanos or "0",
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        **rest,
    }


class Settlements:
    """Settles requests of this instance, and what crashed instances left behind."""

    def __init__(
        self,
        send: Callable[[Sequence[Item]], Awaitable[list[Answer]]],
        *,
        upstream_for: Callable[[str, str], Upstream | None],
        open_key: Callable[[str], str | None],
        journal: Journal | None,
    ) -> None:
        self._queue = GroupCommit(send)
        self._upstream_for = upstream_for
        self._open_key = open_key
        self._journal = journal
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Runs something that outlives its request; `drain` waits for it."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self, item: Item) -> Answer | None:
        """The database's answer, or None when it does not take the settlement now: then it is kept and tried
        again.
        """
        try:
            return await self._submit(item)
        except asyncio.CancelledError:
            self._write(item)  # in the end: nobody may be there to wait for a thread
            raise
        except Exception as error:  # whatever it was, the charge must not be lost with it
            if not isinstance(error, GatewayError):
                log.error("settlement_broken", request_id=item["request_id"], exc_info=error)
            await asyncio.to_thread(self._write, item)
            self.spawn(self._retry(item), f"settlement of {item['request_id']}")
            return None

    def release(self, request_id: str) -> None:
        """Settles an admission whose caller was gone before anything was sent: nothing happened, nothing is
        charged.
        """
        nothing = Usage(prompt_tokens=0, completion_tokens=0)
        self.spawn(
            self.settle(settlement(request_id, "cancelled", "usage", nothing)), f"release of {request_id}"
        )

    async def _submit(self, item: Item) -> Answer | None:
        answer = await self._queue.submit(
            item, group=item["request_id"], weight=len(item.get("stored_answer") or "")
        )
        if answer["outcome"] == "failed":
            log.error(
                "settlement_failed",
                request_id=item["request_id"],
                sqlstate=answer["sqlstate"],
                reason=answer["message"],
            )
            raise GatewayError()
        if answer["outcome"] == "unknown":
            log.error("settlement_of_unknown_request", request_id=item["request_id"])
            return None
        if answer.get("overrun_nanos") and answer["outcome"] == "settled":
            log.error(
                "overrun",
                request_id=item["request_id"],
                overrun_nanos=answer["overrun_nanos"],
                user_id=answer["user_id"],
            )
        return answer

    def _write(self, item: Item) -> None:
        if self._journal is None:
            return
        try:
            self._journal.keep(item)
        except OSError as error:
            log.error("settlement_not_journaled", request_id=item["request_id"], reason=str(error))

    async def _retry(self, item: Item) -> None:
        attempt = 0
        while True:
            await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
            attempt += 1
            try:
                settled = await self._submit(item)
            except Exception as error:  # noqa: BLE001  # it goes on until the database has it
                log.warning(
                    "settlement_waits", request_id=item["request_id"], attempt=attempt, reason=str(error)
                )
                continue
            # A request that this database does not know may be another one's: its file waits for a start on
            # that.
            if self._journal is not None and settled is not None:
                await asyncio.to_thread(self._journal.drop, item)
            return

    def replay_journal(self) -> None:
        """Takes up what earlier processes could not settle."""
        for item in self._journal.read() if self._journal is not None else ():
            self.spawn(self._retry(item), f"settlement of {item['request_id']}")

    # What the upstream knows.

    async def look_up(self, hold: Mapping[str, Any], delays: Sequence[float]) -> Usage | None:
        """What the upstream says a generation cost, or None while it does not know it. Raises
        UpstreamUnavailable.

        `hold`: mode, environment, generation_id, and, where the request went out under the user's own key,
        byok and provider_key (encrypted). Without that key nobody is asked: the operator's would not know of
        it.
        """
        upstream = self._upstream_for(hold["mode"], hold["environment"])
        if upstream is None:
            raise UpstreamUnavailable("There is no upstream that could know this generation.")
        key = None
        if hold.get("byok"):
            key = self._open_key(hold["provider_key"]) if hold.get("provider_key") else None
            if key is None:
                log.warning("provider_key_gone", generation_id=hold["generation_id"])
                return None
        for delay in delays:
            await asyncio.sleep(delay)
            data = await upstream.find_generation(hold["generation_id"], api_key=key)
            if data is not None and (found := read_generation(data)).cost is not None:
                return found
        return None

    async def look_up_now(self, hold: Mapping[str, Any]) -> Usage | None:
        """What the upstream says within the few seconds that a client may be made to wait for it."""
        try:
            async with asyncio.timeout(QUICK_LOOKUP_SECONDS):
                return await self.look_up(hold, QUICK_LOOKUPS)
        except (UpstreamUnavailable, TimeoutError):
            return None

    def resolve_later(self, hold: Mapping[str, Any], item: Item) -> None:
        """Goes on asking for the cost of a generation; in the end it settles what is known, or leaves the
        hold to the sweep.
        """
        self.spawn(self._resolve_patiently(hold, item), f"lookup for {item['request_id']}")

    async def _resolve_patiently(self, hold: Mapping[str, Any], item: Item) -> None:
        for delay in PATIENT_LOOKUPS:
            try:
                found = await self.look_up(hold, (delay,))
            except UpstreamUnavailable:
                continue
            if found is not None:
                await self.settle(with_generation(item, found))
                return
        if item["source"] != "none":
            await self.settle(item)

    async def resolve_expired(self, holds: Sequence[Mapping[str, Any]]) -> None:
        """Finishes expired holds: by what the upstream says of them, else at no charge. One that cannot be
        asked about now stays.
        """
        await asyncio.gather(*(self._resolve_expired(hold) for hold in holds))

    async def _resolve_expired(self, hold: Mapping[str, Any]) -> bool:
        found = None
        if hold["generation_id"]:
            try:
                found = await self.look_up(hold, (0.0,))
            except UpstreamUnavailable as error:
                log.warning("expired_hold_kept", request_id=hold["request_id"], reason=error.message)
                return False
        if found is None:
            log.warning(
                "expired_at_no_charge", request_id=hold["request_id"], generation_id=hold["generation_id"]
            )
            item = settlement(hold["request_id"], "expired", "none", Usage(), error_code="lost")
        else:
            item = settlement(hold["request_id"], "cancelled", "generation", found)
        return await self.settle(item) is not None

    async def sweep(
        self, list_expired: Callable[[int, int], Awaitable[Sequence[Mapping[str, Any]]]]
    ) -> dict[str, int]:
        """Resolves expired holds, batch after batch; returns counts; passes those that cannot be asked about
        now.
        """
        found = resolved = 0
        while holds := await list_expired(SWEEP_BATCH, found - resolved):
            done = sum(await asyncio.gather(*(self._resolve_expired(hold) for hold in holds)))
            found, resolved = found + len(holds), resolved + done
        return {"expired": found, "resolved": resolved}

    async def drain(self, seconds: float) -> None:
        """Waits for what is under way, at most this long; the rest is in the journal, or expires."""
        await self._queue.drain()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)


def with_generation(item: Item, found: Usage) -> Item:
    """A settlement with what the upstream says of its generation; tokens it does not name stay as they were
    known.
    """
    known = {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "cached_tokens": found.cached_tokens,
        "reasoning_tokens": found.reasoning_tokens,
    }
    known = {name: tokens for name, tokens in known.items() if tokens is not None}
    return {**item, **known, "source": "generation", "billable_nanos": found.billable_nanos}
