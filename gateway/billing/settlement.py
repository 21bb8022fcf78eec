"""Charges every request exactly once: settles it, retries, and asks the upstream for costs that come late.

A settlement that the database did not take is retried with backoff and, where there is a disk, written to a
journal that the next start reads. Settling is idempotent per request, so doing it twice is harmless, and the
hold protects the money meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Unpack

import structlog

from common.errors import DatabaseUnavailable, GatewayError, UpstreamUnavailable
from db_rows.requests import (
    ExpiredHold,
    GenerationNote,
    NoteAnswer,
    Settled,
    SettlementAnswer,
    SettlementDetails,
    SettlementItem,
    SettlementSource,
    SettlementStatus,
    SettlementVerdict,
)
from db_rows.shared import Environment, Mode
from gateway.billing.group_commit import GroupCommit
from gateway.billing.journal import Journal
from gateway.upstream.client import Upstream
from gateway.upstream.usage import Usage, read_generation

log = structlog.get_logger("settlements")

# Shortly after its end the upstream may not know a generation yet: a 404 then is no answer.
QUICK_LOOKUPS = (0.0, 0.25, 0.5, 1.0)
QUICK_LOOKUP_SECONDS = 5.0
PATIENT_LOOKUPS = (2.0, 4.0, 8.0, 16.0, 30.0, 60.0, 60.0, 120.0, 120.0)
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
NOTE_SECONDS = 2.0
SWEEP_BATCH = 64

NOTHING_USED = Usage(prompt_tokens=0, completion_tokens=0)


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation at the upstream, and the account it was made under.

    `byok`: it was made under the user's own key, `provider_key` (encrypted; None where the user has none any
    more).
    """

    mode: Mode
    environment: Environment
    generation_id: str
    byok: bool = False
    provider_key: str | None = None


def settlement(
    request_id: str,
    status: SettlementStatus,
    source: SettlementSource,
    usage: Usage,
    **details: Unpack[SettlementDetails],
) -> SettlementItem:
    """A settlement item: what the database is told about the end of a request. An unknown cost is a cost of
    zero, source `none`.

    `stored_answer` (sealed) is stored for the request's idempotency key and, where it completed, at `cache`
    (a Hold's). Without one the idempotency key is free again if nothing was charged, and else refuses a
    second run.
    """
    return {
        "request_id": request_id,
        "status": status,
        "source": source,
        # Exact text, never a float: the database multiplies it with the markup and rounds up once.
        "billable_nanos": usage.billable_nanos or "0",
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        **details,
    }


class Settlements:
    """Settles requests of this instance, and those that crashed instances left behind."""

    def __init__(
        self,
        send: Callable[[Sequence[SettlementItem]], Awaitable[Sequence[SettlementAnswer]]],
        *,
        note_generations: Callable[[Sequence[GenerationNote]], Awaitable[Sequence[NoteAnswer]]],
        upstream_for: Callable[[Mode, Environment], Upstream | None],
        decrypt: Callable[[str], str | None],
        journal: Journal | None,
    ) -> None:
        self._queue: GroupCommit[SettlementItem, SettlementVerdict] = GroupCommit(send)
        self._notes: GroupCommit[GenerationNote, NoteAnswer] = GroupCommit(note_generations)
        self._upstream_for = upstream_for
        self._decrypt = decrypt
        self._journal = journal
        self._tasks: set[asyncio.Task[object]] = set()

    def spawn(self, work: Coroutine[object, None, object], name: str) -> None:
        """Runs something that outlives its request; `drain` waits for it."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self, item: SettlementItem) -> Settled | None:
        """The charge, or None when the database does not take the settlement now: then it is kept and
        retried.
        """
        try:
            return await self._submit(item)
        except asyncio.CancelledError:
            # Written here, not in a thread: the loop is ending, and nobody may be there to wait for a thread.
            self._write(item)
            raise
        except Exception as error:  # whatever it was, the charge must not be lost with it
            if not isinstance(error, GatewayError):
                log.error("settlement_broken", request_id=item["request_id"], exc_info=error)
            # On disk before it is retried: a process that dies meanwhile leaves it to the next start.
            await asyncio.to_thread(self._write, item)
            self.spawn(self._retry(item), f"settlement of {item['request_id']}")
            return None

    def release(self, request_id: str) -> None:
        """Settles an admission whose caller was gone before anything was sent: it is charged nothing."""
        item = settlement(request_id, "cancelled", "usage", NOTHING_USED)
        self.spawn(self.settle(item), f"release of {request_id}")

    async def _submit(self, item: SettlementItem) -> Settled | None:
        request_id = item["request_id"]
        weight = len(item.get("stored_answer") or "")
        answer = await self._queue.submit(item, group=request_id, weight=weight)
        match answer["outcome"]:
            case "failed":
                sqlstate, reason = answer["sqlstate"], answer["message"]
                log.error("settlement_failed", request_id=request_id, sqlstate=sqlstate, reason=reason)
                raise GatewayError()
            case "unknown":
                # Nothing to charge: it was never admitted here, or this is another database than it was
                # admitted by.
                log.error("settlement_of_unknown_request", request_id=request_id)
                return None
            case "settled" if answer.get("overrun_nanos"):
                # The upstream billed beyond the caps that we sent: the operator's loss, and a reason for an
                # alarm.
                overrun, user_id = answer["overrun_nanos"], answer["user_id"]
                log.error("overrun", request_id=request_id, overrun_nanos=overrun, user_id=user_id)
        return answer

    def _write(self, item: SettlementItem) -> None:
        if self._journal is None:
            return
        try:
            self._journal.keep(item)
        except OSError as error:
            log.error("settlement_not_journaled", request_id=item["request_id"], reason=str(error))

    async def _retry(self, item: SettlementItem) -> None:
        attempt = 0
        while True:
            await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
            attempt += 1
            try:
                settled = await self._submit(item)
            except Exception as error:  # noqa: BLE001  # it is retried until the database has it
                reason = str(error)
                log.warning("settlement_waits", request_id=item["request_id"], attempt=attempt, reason=reason)
                continue
            # A request that this database does not know may belong to another one: its file stays for a start
            # on that database.
            if self._journal is not None and settled is not None:
                await asyncio.to_thread(self._journal.drop, item)
            return

    def replay_journal(self) -> None:
        """Takes up what earlier processes could not settle."""
        for item in self._journal.read() if self._journal is not None else ():
            self.spawn(self._retry(item), f"settlement of {item['request_id']}")

    # Ids of generations that are running: with them any instance can finish a request whose instance died.

    def note_generation(self, request_id: str, generation_id: str) -> None:
        """Stores the generation id of a running request, in the background."""
        self.spawn(self._note(request_id, generation_id), f"note for {request_id}")

    async def keep_generation(self, request_id: str, generation_id: str) -> None:
        """Stores it before it returns, or gives up after two seconds: on a serverless platform nothing may
        run after the response.
        """
        try:
            async with asyncio.timeout(NOTE_SECONDS):
                await self._note(request_id, generation_id)
        except TimeoutError:
            reason = "the database did not answer in time"
            log.warning("generation_not_noted", request_id=request_id, reason=reason)

    async def _note(self, request_id: str, generation_id: str) -> None:
        note: GenerationNote = {"request_id": request_id, "generation_id": generation_id}
        try:
            await self._notes.submit(note, group=request_id)
        except DatabaseUnavailable as error:
            log.warning("generation_not_noted", request_id=request_id, reason=error.message)

    # What the upstream knows of a generation.

    async def look_up(self, generation: Generation, delays: Sequence[float]) -> Usage | None:
        """The generation's usage and cost as the upstream tells them, None while it does not know them.

        Asks once after each delay (seconds). Raises UpstreamUnavailable.
        """
        upstream = self._upstream_for(generation.mode, generation.environment)
        if upstream is None:
            raise UpstreamUnavailable("There is no upstream that could know this generation.")
        key = self._own_key(generation)
        if generation.byok and key is None:
            # The operator's account would not know it.
            log.warning("provider_key_gone", generation_id=generation.generation_id)
            return None
        for delay in delays:
            await asyncio.sleep(delay)
            data = await upstream.find_generation(generation.generation_id, api_key=key)
            if data is not None and (usage := read_generation(data)).cost is not None:
                return usage
        return None

    def _own_key(self, generation: Generation) -> str | None:
        if not generation.byok or generation.provider_key is None:
            return None
        return self._decrypt(generation.provider_key)

    async def look_up_now(self, generation: Generation) -> Usage | None:
        """What the upstream tells within the few seconds that a client may be made to wait for it."""
        try:
            async with asyncio.timeout(QUICK_LOOKUP_SECONDS):
                return await self.look_up(generation, QUICK_LOOKUPS)
        except (UpstreamUnavailable, TimeoutError):
            return None

    def resolve_later(self, generation: Generation, item: SettlementItem) -> None:
        """Keeps asking for the cost of a generation; in the end it settles what is known, or leaves the hold
        to the sweep.
        """
        self.spawn(self._resolve_patiently(generation, item), f"lookup for {item['request_id']}")

    async def _resolve_patiently(self, generation: Generation, item: SettlementItem) -> None:
        for delay in PATIENT_LOOKUPS:
            try:
                usage = await self.look_up(generation, (delay,))
            except UpstreamUnavailable:
                continue
            if usage is not None:
                await self.settle(with_generation(item, usage))
                return
        # A running count of a stream that broke off is better than nothing; without one the sweep decides.
        if item["source"] != "none":
            await self.settle(item)

    # Requests that outlived their holds.

    async def resolve_expired(self, holds: Sequence[ExpiredHold]) -> None:
        """Ends expired holds: by what the upstream tells of them, else without a charge. A hold whose
        generation cannot be asked about now stays.
        """
        await asyncio.gather(*(self._resolve_expired(hold) for hold in holds))

    async def _resolve_expired(self, hold: ExpiredHold) -> bool:
        usage = None
        generation = generation_of(hold)
        if generation is not None:
            try:
                usage = await self.look_up(generation, (0.0,))
            except UpstreamUnavailable as error:
                log.warning("expired_hold_kept", request_id=hold["request_id"], reason=error.message)
                return False
        return await self.settle(_end_of_expired(hold, usage)) is not None

    async def sweep(
        self, list_expired: Callable[[int, int], Awaitable[Sequence[ExpiredHold]]]
    ) -> dict[str, int]:
        """Resolves expired holds, batch after batch, past those that cannot be asked about now. Returns
        counts.
        """
        expired = resolved = 0
        # Holds that stay are skipped from now on, or the first of them would be listed for ever.
        while holds := await list_expired(SWEEP_BATCH, expired - resolved):
            done = sum(await asyncio.gather(*(self._resolve_expired(hold) for hold in holds)))
            expired, resolved = expired + len(holds), resolved + done
        return {"expired": expired, "resolved": resolved}

    async def drain(self, seconds: float) -> None:
        """Waits at most this long for what is under way; the rest is in the journal, or its hold expires."""
        await self._queue.drain()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)


def generation_of(hold: ExpiredHold) -> Generation | None:
    """The generation that a hold's request had started, None where none is known."""
    if not hold["generation_id"]:
        return None
    return Generation(
        mode=hold["mode"],
        environment=hold["environment"],
        generation_id=hold["generation_id"],
        byok=hold["byok"],
        provider_key=hold["provider_key"],
    )


def _end_of_expired(hold: ExpiredHold, usage: Usage | None) -> SettlementItem:
    request_id = hold["request_id"]
    if usage is not None:
        return settlement(request_id, "cancelled", "generation", usage)
    log.warning("expired_at_no_charge", request_id=request_id, generation_id=hold["generation_id"])
    return settlement(request_id, "expired", "none", Usage(), error_code="lost")


def with_generation(item: SettlementItem, usage: Usage) -> SettlementItem:
    """A settlement with the upstream's figures of its generation; counts that it does not give stay."""
    told = item.copy()
    told["source"], told["billable_nanos"] = "generation", usage.billable_nanos or "0"
    if usage.prompt_tokens is not None:
        told["prompt_tokens"] = usage.prompt_tokens
    if usage.completion_tokens is not None:
        told["completion_tokens"] = usage.completion_tokens
    if usage.cached_tokens is not None:
        told["cached_tokens"] = usage.cached_tokens
    if usage.reasoning_tokens is not None:
        told["reasoning_tokens"] = usage.reasoning_tokens
    return told
