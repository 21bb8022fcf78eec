"""Queue: calls that arrive together share one round trip. Group commit: calls that arrive while a batch is in
flight travel together in the next.

No timer, so nothing waits when idle. One batch is in flight per queue. A batch that is lost is sent again
with the same ids; items whose user is locked elsewhere go again while their neighbours are served. It knows
nothing of what it carries but `request_id`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.errors import DatabaseUnavailable, GatewayError

Item = dict[str, Any]
Answer = dict[str, Any]

# Larger batches make everybody walk in step: 64 requests at a time came through a fifth slower than 24
# (benchmarks).
BATCH_SIZE = 24
BATCH_SIZE_PER_GROUP = 16
# Bytes of stored answers that one round trip carries.
BATCH_WEIGHT = 4 * 1024 * 1024
PATIENCE_SECONDS = 2.0
RESENDS = 2


@dataclass(slots=True, eq=False)
class _Waiting:
    item: Item
    group: Hashable
    future: asyncio.Future[Answer]
    weight: int = 0
    since: float = field(default_factory=time.monotonic)


class GroupCommit:
    """A queue in front of one SQL function that takes and returns arrays.

    `send` carries a batch and returns an answer for each item, matched by request_id. `abandoned` gets the
    answers that nobody waits for any more, because their caller was cancelled meanwhile.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Item]], Awaitable[list[Answer]]],
        *,
        abandoned: Callable[[Item, Answer], None] | None = None,
    ) -> None:
        self._send = send
        self._abandoned = abandoned
        self._waiting: deque[_Waiting] = deque()
        self._sender: asyncio.Task[None] | None = None

    async def submit(self, item: Item, *, group: Hashable, weight: int = 0) -> Answer:
        """The answer to one item; `group` is what at most 16 items of one batch may share (a key), `weight`
        what it carries, in bytes.

        Raises DatabaseUnavailable when the batch was lost repeatedly, or the user stayed locked elsewhere.
        """
        waiting = _Waiting(item, group, asyncio.get_running_loop().create_future(), weight)
        self._waiting.append(waiting)
        self._wake()
        try:
            return await waiting.future
        except asyncio.CancelledError:
            # The future is cancelled with its caller, and `_deliver` sees that, unless the answer had just
            # come.
            if not waiting.future.cancelled() and waiting.future.exception() is None:
                self._hand_over(waiting, waiting.future.result())
            raise

    async def drain(self) -> None:
        """Waits until everything that was submitted has been answered."""
        while self._sender is not None:
            await asyncio.wait([self._sender])

    def _hand_over(self, waiting: _Waiting, answer: Answer) -> None:
        if self._abandoned is not None:
            self._abandoned(waiting.item, answer)

    def _wake(self) -> None:
        if self._sender is None:
            self._sender = asyncio.create_task(self._run(), name="group commit")
            self._sender.add_done_callback(self._stopped)

    def _stopped(self, task: asyncio.Task[None]) -> None:
        self._sender = None
        if not task.cancelled() and (error := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "group commit failed", "exception": error, "task": task}
            )
        if task.cancelled():
            # The loop is shutting down: nobody would send what waits.
            _fail(self._waiting, DatabaseUnavailable())
            self._waiting.clear()
        elif self._waiting:
            self._wake()

    async def _run(self) -> None:
        while self._waiting:
            batch = self._next_batch()
            try:
                again = await self._carry(batch)
            except BaseException as error:
                _fail(batch, DatabaseUnavailable() if isinstance(error, asyncio.CancelledError) else error)
                raise
            alone = not self._waiting
            self._waiting.extend(again)
            if again and alone:
                # Everything is held up by locks of others: asking at once again would only spin.
                await asyncio.sleep(0.01)

    async def _carry(self, batch: list[_Waiting]) -> list[_Waiting]:
        """Sends a batch and hands out the answers; returns what has to go again. One that is refused whole is
        sent in halves, so that the item which cannot even be read fails alone.
        """
        try:
            answers = await self._send_until_answered(batch)
        except DatabaseUnavailable as error:
            _fail(batch, error)
            return []
        except GatewayError as error:
            if len(batch) == 1:
                _fail(batch, error)
                return []
            middle = len(batch) // 2
            return await self._carry(batch[:middle]) + await self._carry(batch[middle:])
        return self._deliver(batch, answers)

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        kept: deque[_Waiting] = deque()
        groups: Counter[Hashable] = Counter()
        weight = 0
        while self._waiting and len(batch) < BATCH_SIZE:
            waiting = self._waiting.popleft()
            if groups[waiting.group] < BATCH_SIZE_PER_GROUP and (
                not batch or weight + waiting.weight <= BATCH_WEIGHT
            ):
                groups[waiting.group] += 1
                weight += waiting.weight
                batch.append(waiting)
            else:
                kept.append(waiting)
        self._waiting.extendleft(reversed(kept))
        return batch

    async def _send_until_answered(self, batch: list[_Waiting]) -> dict[str, Answer]:
        for resend in range(RESENDS + 1):
            try:
                answers = await self._send([waiting.item for waiting in batch])
            except DatabaseUnavailable:
                if resend == RESENDS:
                    raise
                for waiting in batch:
                    waiting.item = {**waiting.item, "resent": True}
            else:
                return {answer["request_id"]: answer for answer in answers}
        raise AssertionError("unreachable")

    def _deliver(self, batch: list[_Waiting], answers: dict[str, Answer]) -> list[_Waiting]:
        """Hands out the answers; returns what has to go again."""
        again = []
        for waiting in batch:
            answer = answers.get(waiting.item["request_id"])
            if answer is None:
                _fail([waiting], LookupError(f"no answer for request {waiting.item['request_id']}"))
            elif answer["outcome"] != "busy":
                if waiting.future.cancelled():
                    self._hand_over(waiting, answer)
                else:
                    waiting.future.set_result(answer)
            elif time.monotonic() - waiting.since < PATIENCE_SECONDS:
                again.append(waiting)
            else:
                _fail(
                    [waiting],
                    DatabaseUnavailable("This account is busy with a change. Try again.", retry_after=1),
                )
        return again


def _fail(batch: Iterable[_Waiting], error: BaseException) -> None:
    for waiting in batch:
        if not waiting.future.done():
            waiting.future.set_exception(error)
            waiting.future.exception()  # an abandoned one has nobody else to look at it
