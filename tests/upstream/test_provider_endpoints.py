"""Lists of a model's provider endpoints are fetched by one caller at a time, kept for a while, and limited in
number.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from common.errors import UpstreamUnavailable
from gateway.upstream.provider_endpoints import (
    FETCHES_AT_ONCE,
    MAX_BYTES,
    MOST_LISTS,
    RETRY_SECONDS,
    ProviderEndpoints,
)

LIST = b'{"data": {"endpoints": []}}'


class Source:
    """An upstream that answers when it is let, and counts."""

    def __init__(self, answer: bytes | Exception | None = LIST) -> None:
        self.answer = answer
        self.asked: Counter[str] = Counter()
        self.let = asyncio.Event()
        self.let.set()
        self.running = self.most = 0
        self.now = 0.0

    async def fetch(self, model_id: str) -> bytes | None:
        self.asked[model_id] += 1
        self.running += 1
        self.most = max(self.most, self.running)
        await self.let.wait()
        self.running -= 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def lists(self) -> ProviderEndpoints:
        return ProviderEndpoints(self.fetch, ttl_seconds=300, clock=lambda: self.now)


async def test_many_callers_at_once_wait_for_one_fetch() -> None:
    source = Source()
    source.let.clear()
    lists = source.lists()
    asking = [asyncio.create_task(lists.get("a/b")) for _ in range(10)]
    while not source.asked:  # noqa: ASYNC110  # until the fetch has begun
        await asyncio.sleep(0)
    asking[0].cancel()
    source.let.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert answers[1:] == [LIST] * 9
    assert source.asked == {"a/b": 1}


async def test_a_list_is_fetched_again_when_its_time_is_over() -> None:
    source = Source()
    lists = source.lists()
    for now, asked in ((0.0, 1), (299.0, 1), (300.0, 2)):
        source.now = now
        assert await lists.get("a/b") == LIST
        assert source.asked["a/b"] == asked


async def test_a_model_that_the_upstream_does_not_know_is_remembered_too() -> None:
    source = Source(None)
    lists = source.lists()
    assert [await lists.get("a/b") for _ in range(3)] == [None] * 3
    assert source.asked["a/b"] == 1


@pytest.mark.parametrize(
    "answer", [UpstreamUnavailable(), b"nonsense", b"[]", b'{"data": []}', b" " * (MAX_BYTES + 1)]
)
async def test_a_failure_is_not_repeated_at_once(answer: bytes | Exception) -> None:
    source = Source(answer)
    lists = source.lists()
    for now, asked in ((0.0, 1), (RETRY_SECONDS - 1, 1), (RETRY_SECONDS, 2)):
        source.now = now
        with pytest.raises(UpstreamUnavailable):
            await lists.get("a/b")
        assert source.asked["a/b"] == asked
    source.answer, source.now = LIST, 100.0
    assert await lists.get("a/b") == LIST


async def test_a_bounded_number_is_kept_and_few_are_fetched_at_once() -> None:
    source = Source()
    lists = source.lists()
    await asyncio.gather(*(lists.get(f"a/{number}") for number in range(MOST_LISTS + 50)))
    assert len(lists) == MOST_LISTS
    assert source.most <= FETCHES_AT_ONCE


async def test_closing_stops_what_is_being_fetched() -> None:
    source = Source()
    source.let.clear()
    lists = source.lists()
    asking = asyncio.create_task(lists.get("a/b"))
    while not source.asked:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await lists.aclose()
    with pytest.raises(asyncio.CancelledError):
        await asking
