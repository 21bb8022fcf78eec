"""A queue in front of one SQL function: calls that arrive while a batch is in flight travel together in the
next.

There is no timer, so nothing waits when the queue is idle, and one batch is in flight per queue. A batch
whose answer is lost is sent again with the same ids; an item whose user is locked elsewhere is sent again
while its neighbours are served. The queue knows nothing of what it carries but `request_id`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

from common.errors import DatabaseUnavailable, GatewayError
from db_rows.requests import Busy

# With larger batches callers walk in step: 64 requests at a time were a fifth slower than 24 (benchmarks).
BATCH_SIZE = 24
# One key's burst must not fill every batch.
BATCH_SIZE_PER_GROUP = 16
# Bytes of stored answers that one round trip carries.
BATCH_WEIGHT = 4 * 1024 * 1024
PATIENCE_SECONDS = 2.0
RESENDS = 2


# Typed dictionaries, each with the id that matches an answer to its item.
ItemT = TypeVar("ItemT", bound=Mapping[str, object])
AnswerT = TypeVar("AnswerT", bound=Mapping[str, object])


@dataclass(slots=True, eq=False)
class _Waiting(Generic[ItemT, AnswerT]):
    item: ItemT
    group: Hashable
    future: asyncio.Future[AnswerT]
    weight: int = 0
    since: float = field(default_factory=time.monotonic)


class GroupCommit(Generic[ItemT, AnswerT]):
    """A queue in front of one SQL function that takes and returns arrays.

    `send` carries a batch and returns an answer for each item, matched by request_id. `abandoned` gets the
    answers that nobody waits for any more, because their caller was cancelled meanwhile. `mark_resent` makes
    the item that is sent where the answer to the first was lost.
    """

    def __init__(
        self,
        send: Callable[[Sequence[ItemT]], Awaitable[Sequence[AnswerT | Busy]]],
        *,
        abandoned: Callable[[ItemT, AnswerT], None] | None = None,
        mark_resent: Callable[[ItemT], ItemT] | None = None,
    ) -> None:
        self._send = send
        self._abandoned = abandoned
        self._mark_resent = mark_resent
        self._waiting: deque[_Waiting[ItemT, AnswerT]] = deque()
        self._sender: asyncio.Task[None] | None = None

    async def submit(self, item: ItemT, *, group: Hashable, weight: int = 0) -> AnswerT:
        """The answer to one item. At most 16 items of one `group` (a key) share a batch; `weight` is the size
        of what the item carries, in bytes.

        Raises DatabaseUnavailable when the batch was lost repeatedly, or the user stayed locked elsewhere.
        """
        future: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(item, group, future, weight)
        self._waiting.append(waiting)
        self._wake()
        try:
            return await future
        except asyncio.CancelledError:
            # The future is cancelled together with its caller, and `_deliver` sees that. If the answer had
            # just come, nobody else will hand it over.
            if not waiting.future.cancelled() and waiting.future.exception() is None:
                self._hand_over(waiting, waiting.future.result())
            raise

    async def drain(self) -> None:
        """Waits until everything that was submitted has been answered."""
        while self._sender is not None:
            await asyncio.wait([self._sender])

    def _hand_over(self, waiting: _Waiting[ItemT, AnswerT], answer: AnswerT) -> None:
        if self._abandoned is not None:
            self._abandoned(waiting.item, answer)

    def _wake(self) -> None:
        if self._sender is None:
            self._sender = asyncio.create_task(self._run(), name="group commit")
            self._sender.add_done_callback(self._stopped)

    def _stopped(self, task: asyncio.Task[None]) -> None:
        self._sender = None
        if task.cancelled():
            # The loop is shutting down: nobody would send what waits.
            _fail(self._waiting, DatabaseUnavailable())
            self._waiting.clear()
            return
        if (error := task.exception()) is not None:
            report = {"message": "group commit failed", "exception": error, "task": task}
            asyncio.get_running_loop().call_exception_handler(report)
        if self._waiting:
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
                # Every item is held up by a lock elsewhere: asking again at once would only spin.
                await asyncio.sleep(0.01)

    async def _carry(self, batch: list[_Waiting[ItemT, AnswerT]]) -> list[_Waiting[ItemT, AnswerT]]:
        """Sends a batch and hands out the answers; returns the items that have to be sent again.

        A batch that is refused whole is sent in halves, so that an item which cannot even be read fails
        alone.
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

    def _next_batch(self) -> list[_Waiting[ItemT, AnswerT]]:
        batch: list[_Waiting[ItemT, AnswerT]] = []
        passed_over: deque[_Waiting[ItemT, AnswerT]] = deque()
        groups: Counter[Hashable] = Counter()
        weight = 0
        while self._waiting and len(batch) < BATCH_SIZE:
            waiting = self._waiting.popleft()
            fits = not batch or weight + waiting.weight <= BATCH_WEIGHT
            if fits and groups[waiting.group] < BATCH_SIZE_PER_GROUP:
                groups[waiting.group] += 1
                weight += waiting.weight
                batch.append(waiting)
            else:
                passed_over.append(waiting)
        self._waiting.extendleft(reversed(passed_over))
        return batch

    async def _send_until_answered(
        self, batch: list[_Waiting[ItemT, AnswerT]]
    ) -> dict[object, AnswerT | Busy]:
        for resend in range(RESENDS + 1):
            try:
                answers = await self._send([waiting.item for waiting in batch])
            except DatabaseUnavailable:
                if resend == RESENDS:
                    raise
                self._mark_all_resent(batch)
            else:
                return {answer["request_id"]: answer for answer in answers}
        raise AssertionError("unreachable")

    def _mark_all_resent(self, batch: list[_Waiting[ItemT, AnswerT]]) -> None:
        # The lost batch may have been committed: the database must know the second for a repetition.
        if self._mark_resent is not None:
            for waiting in batch:
                waiting.item = self._mark_resent(waiting.item)

    def _deliver(
        self, batch: list[_Waiting[ItemT, AnswerT]], answers: dict[object, AnswerT | Busy]
    ) -> list[_Waiting[ItemT, AnswerT]]:
        """Hands out the answers; returns the items that have to be sent again."""
        again = []
        for waiting in batch:
            answer = answers.get(waiting.item["request_id"])
            if answer is None:
                _fail([waiting], LookupError(f"no answer for request {waiting.item['request_id']}"))
            elif answer["outcome"] != "busy":
                self._answer(waiting, cast(AnswerT, answer))
            elif time.monotonic() - waiting.since < PATIENCE_SECONDS:
                again.append(waiting)
            else:
                _fail([waiting], _busy())
        return again

    def _answer(self, waiting: _Waiting[ItemT, AnswerT], answer: AnswerT) -> None:
        if waiting.future.cancelled():
            self._hand_over(waiting, answer)
        else:
            waiting.future.set_result(answer)


def _busy() -> DatabaseUnavailable:
    return DatabaseUnavailable("This account is busy with a change. Try again.", retry_after=1)


def _fail(batch: Iterable[_Waiting[ItemT, AnswerT]], error: BaseException) -> None:
    for waiting in batch:
        if not waiting.future.done():
            waiting.future.set_exception(error)
            waiting.future.exception()  # an abandoned one has nobody else to look at it
