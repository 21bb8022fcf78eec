"""Calls that arrive while a batch is in flight travel together in the next, and every caller gets an answer,
whatever fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from common.errors import DatabaseUnavailable
from gateway.billing import group_commit as batching
from gateway.billing.group_commit import GroupCommit
from supabase_config import DatabaseFault

Item = dict[str, Any]


class Server:
    """What a queue sends to: answers when it is let, and keeps what it got."""

    def __init__(self) -> None:
        self.batches: list[list[Item]] = []
        self.in_flight = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.arrived = asyncio.Event()
        self.answer: Callable[[Item], Item] = lambda item: {
            "request_id": item["request_id"],
            "outcome": "admitted",
        }
        self.failures: list[BaseException] = []

    async def __call__(self, items: Sequence[Item]) -> list[Item]:
        self.batches.append([dict(item) for item in items])
        self.in_flight += 1
        assert self.in_flight == 1, "one batch is in flight at a time"
        self.arrived.set()
        try:
            await self.gate.wait()
            if self.failures:
                raise self.failures.pop(0)
            return [self.answer(item) for item in items]
        finally:
            self.in_flight -= 1

    def sent(self) -> list[list[str]]:
        return [[item["request_id"] for item in batch] for batch in self.batches]


def item(number: int | str) -> Item:
    return {"request_id": str(number)}


async def flying(queue: GroupCommit[Item, Item], server: Server) -> asyncio.Task[Item]:
    """Holds the server's answer back, with one item of its own in flight."""
    server.gate.clear()
    server.arrived.clear()
    first = asyncio.create_task(queue.submit(item("first"), group="first"))
    await server.arrived.wait()
    return first


async def submitted(
    queue: GroupCommit[Item, Item], numbers: range | list[int], group: Callable[[int], Any] = lambda n: n
) -> list[asyncio.Task[Item]]:
    tasks = [asyncio.create_task(queue.submit(item(n), group=group(n))) for n in numbers]
    await asyncio.sleep(0)  # each runs as far as its wait
    return tasks


async def test_a_call_on_an_idle_queue_is_sent_at_once() -> None:
    server = Server()
    queue = GroupCommit(server)
    task = asyncio.create_task(queue.submit(item(1), group=1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert server.sent() == [["1"]]
    assert (await task)["request_id"] == "1"


async def test_calls_that_arrive_while_a_batch_is_in_flight_travel_together_in_order() -> None:
    server = Server()
    queue = GroupCommit(server)
    first = await flying(queue, server)
    tasks = await submitted(queue, range(10))
    server.gate.set()
    answers = await asyncio.gather(first, *tasks)
    assert [answer["request_id"] for answer in answers] == ["first", *map(str, range(10))]
    assert server.sent() == [["first"], [str(n) for n in range(10)]]


async def test_a_batch_carries_at_most_24() -> None:
    server = Server()
    queue = GroupCommit(server)
    first = await flying(queue, server)
    tasks = await submitted(queue, range(150))
    server.gate.set()
    await asyncio.gather(first, *tasks)
    assert [len(batch) for batch in server.batches] == [1, 24, 24, 24, 24, 24, 24, 6]
    assert [number for batch in server.sent()[1:] for number in batch] == [str(n) for n in range(150)]


async def test_a_group_has_at_most_16_places_and_keeps_its_order() -> None:
    server = Server()
    queue = GroupCommit(server)
    first = await flying(queue, server)
    tasks = await submitted(queue, range(40), group=lambda n: "rare" if n == 39 else "hot")
    server.gate.set()
    await asyncio.gather(first, *tasks)
    assert server.sent()[1:] == [
        [*map(str, range(16)), "39"],
        [*map(str, range(16, 32))],
        [*map(str, range(32, 39))],
    ]


async def test_an_item_without_an_answer_fails_alone() -> None:
    server = Server()
    server.answer = lambda item: {
        "request_id": item["request_id"] if item["request_id"] != "1" else "?",
        "outcome": "admitted",
    }
    queue = GroupCommit(server)
    first = await flying(queue, server)
    tasks = await submitted(queue, range(3))
    server.gate.set()
    answers = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [isinstance(answer, LookupError) for answer in answers] == [False, False, True, False]


async def test_an_item_that_the_database_cannot_read_fails_alone() -> None:
    server = Server()
    queue = GroupCommit(refusing(server, "5"))
    first = await flying(queue, server)
    tasks = await submitted(queue, range(16))
    server.gate.set()
    answers = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [n for n, answer in enumerate(answers[1:]) if isinstance(answer, DatabaseFault)] == [5]
    assert len(server.batches) <= 2 + 2 * 4  # halves, not one by one


def refusing(server: Server, poison: str) -> Callable[[Sequence[Item]], Any]:
    async def send(items: Sequence[Item]) -> list[Item]:
        answers = await server(items)
        if any(item["request_id"] == poison for item in items):
            raise DatabaseFault(sqlstate="22P05")
        return answers

    return send


@pytest.mark.parametrize("answer", [{}, {"request_id": "1"}, {"outcome": "admitted"}], ids=str)
async def test_answers_that_make_no_sense_leave_no_caller_waiting(answer: Item) -> None:
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))
    server = Server()
    server.answer = lambda _: answer
    queue = GroupCommit(server)
    async with asyncio.timeout(5):
        with pytest.raises((KeyError, LookupError)):
            await queue.submit(item(1), group=1)
        server.answer = lambda item: {"request_id": item["request_id"], "outcome": "admitted"}
        assert (await queue.submit(item(2), group=1))["outcome"] == "admitted"
    assert all(isinstance(error, KeyError) for error in errors)


async def test_the_sender_survives_an_unexpected_exception() -> None:
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))
    server = Server()
    queue = GroupCommit(server)
    first = await flying(queue, server)
    tasks = await submitted(queue, range(3))
    server.failures.append(ZeroDivisionError("a bug"))
    server.gate.set()
    async with asyncio.timeout(5):
        with pytest.raises(ZeroDivisionError):
            await first
        assert [answer["outcome"] for answer in await asyncio.gather(*tasks)] == ["admitted"] * 3
    assert [str(error) for error in errors] == ["a bug"]


async def test_a_cancelled_sender_leaves_no_caller_waiting() -> None:
    server = Server()
    queue = GroupCommit(server)
    first = await flying(queue, server)
    tasks = await submitted(queue, range(3))
    (sender,) = (task for task in asyncio.all_tasks() if task.get_name() == "group commit")
    sender.cancel()
    async with asyncio.timeout(5):
        answers = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert {type(answer) for answer in answers} == {DatabaseUnavailable}
    server.gate.set()
    assert (await queue.submit(item(9), group=9))["outcome"] == "admitted"


async def test_a_lost_reply_is_asked_for_again_as_resent() -> None:
    server = Server()
    server.failures.append(DatabaseUnavailable())
    queue: GroupCommit[Item, Item] = GroupCommit(server, mark_resent=lambda item: {**item, "resent": True})
    assert (await queue.submit({"request_id": "1", "resent": False}, group=1))["outcome"] == "admitted"
    assert [[item["resent"] for item in batch] for batch in server.batches] == [[False], [True]]


async def test_a_batch_that_is_lost_again_and_again_is_unavailable_to_all_its_callers() -> None:
    server = Server()
    queue = GroupCommit(server)
    first = await flying(queue, server)
    tasks = await submitted(queue, range(3))
    server.failures += [DatabaseUnavailable() for _ in range(2 * (batching.RESENDS + 1))]
    server.gate.set()
    answers = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert {type(answer) for answer in answers} == {DatabaseUnavailable}
    assert (await queue.submit(item(9), group=9))["outcome"] == "admitted"


async def test_a_busy_item_goes_again_while_its_neighbours_are_served() -> None:
    calls = 0

    def answer(item: Item) -> Item:
        nonlocal calls
        calls += item["request_id"] == "1"
        busy = item["request_id"] == "1" and calls < 3
        return {"request_id": item["request_id"], "outcome": "busy" if busy else "admitted"}

    server = Server()
    server.answer = answer
    queue = GroupCommit(server)
    first = await flying(queue, server)
    tasks = await submitted(queue, range(3))
    server.gate.set()
    answers = await asyncio.gather(first, *tasks)
    assert {answer["outcome"] for answer in answers} == {"admitted"}
    assert server.sent() == [["first"], ["0", "1", "2"], ["1"], ["1"]]


async def test_a_busy_item_does_not_delay_those_that_arrived_meanwhile() -> None:
    server = Server()
    server.answer = lambda item: {
        "request_id": item["request_id"],
        "outcome": "busy" if item["request_id"] == "first" else "admitted",
    }
    queue = GroupCommit(server)
    first = await flying(queue, server)
    (neighbour,) = await submitted(queue, [1])
    server.gate.set()
    await neighbour
    assert server.sent()[:2] == [["first"], ["1", "first"]]
    server.answer = lambda item: {"request_id": item["request_id"], "outcome": "admitted"}
    assert (await first)["outcome"] == "admitted"


async def test_patience_with_a_busy_item_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "PATIENCE_SECONDS", 0.05)
    server = Server()
    server.answer = lambda item: {"request_id": item["request_id"], "outcome": "busy"}
    with pytest.raises(DatabaseUnavailable) as refusal:
        await GroupCommit(server).submit(item(1), group=1)
    assert refusal.value.retry_after == 1
    assert len(server.batches) > 1


# Callers that leave.


async def test_an_admission_is_handed_over_once_when_its_caller_left_before_it_was_sent() -> None:
    server, abandoned = Server(), list[tuple[Item, Item]]()
    queue = GroupCommit(server, abandoned=lambda *pair: abandoned.append(pair))
    first = await flying(queue, server)
    cancelled, stayed = await submitted(queue, range(2))
    cancelled.cancel()
    server.gate.set()
    await asyncio.gather(first, stayed)
    await queue.drain()
    assert cancelled.cancelled()
    assert [(item["request_id"], answer["outcome"]) for item, answer in abandoned] == [("0", "admitted")]


async def test_an_admission_is_handed_over_once_when_its_caller_left_while_it_was_in_flight() -> None:
    server, abandoned = Server(), list[tuple[Item, Item]]()
    queue = GroupCommit(server, abandoned=lambda *pair: abandoned.append(pair))
    first = await flying(queue, server)
    first.cancel()
    await asyncio.sleep(0)
    first.cancel()
    server.gate.set()
    await queue.drain()
    await asyncio.sleep(0)
    assert [item["request_id"] for item, _ in abandoned] == ["first"]


async def test_an_admission_is_handed_over_once_when_its_caller_left_after_the_answer() -> None:
    server, abandoned, callers = Server(), list[str](), list[asyncio.Task[Item]]()

    def note(item: Item, _: Item) -> None:
        abandoned.append(item["request_id"])
        callers[0].cancel()  # its answer is there, and it has not run yet

    queue = GroupCommit(server, abandoned=note)
    first = await flying(queue, server)
    callers += await submitted(queue, range(2))
    callers[1].cancel()
    server.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await callers[0]
    await asyncio.gather(first, queue.drain())
    assert abandoned == ["1", "0"]


async def test_a_caller_that_leaves_before_a_failure_is_not_handed_over() -> None:
    server, abandoned = Server(), list[tuple[Item, Item]]()
    queue = GroupCommit(server, abandoned=lambda *pair: abandoned.append(pair))
    first = await flying(queue, server)
    first.cancel()
    server.failures += [DatabaseUnavailable() for _ in range(batching.RESENDS + 1)]
    server.gate.set()
    await queue.drain()
    assert abandoned == []


async def test_a_caller_that_stays_is_not_handed_over() -> None:
    server, abandoned = Server(), list[tuple[Item, Item]]()
    queue = GroupCommit(server, abandoned=lambda *pair: abandoned.append(pair))
    await asyncio.gather(*(queue.submit(item(n), group=n) for n in range(5)))
    assert abandoned == []


async def test_drain_waits_until_all_is_answered() -> None:
    server = Server()
    queue = GroupCommit(server)
    first = await flying(queue, server)
    tasks = await submitted(queue, range(100))
    server.gate.set()
    await queue.drain()
    await asyncio.sleep(0)
    assert all(task.done() for task in [first, *tasks])


async def test_a_batch_carries_only_so_many_bytes_and_what_is_too_heavy_goes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batching, "BATCH_WEIGHT", 10)
    server = Server()
    queue = GroupCommit(server)
    first = await flying(queue, server)
    weights = [4, 5, 3, 0, 99, 1, 0]
    tasks = [
        asyncio.create_task(queue.submit(item(n), group=n, weight=weight)) for n, weight in enumerate(weights)
    ]
    await asyncio.sleep(0)
    server.gate.set()
    await asyncio.gather(first, *tasks)
    assert server.sent() == [["first"], ["0", "1", "3", "5", "6"], ["2"], ["4"]]
