"""After a key that does not exist, the next keys from its address are verified before anything of the request
is read.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import orjson

from gateway.billing.unknown_keys import MAX_REMEMBERED, REMEMBERED_SECONDS, UnknownKeys
from security import new_key
from tests.support.database import Database
from tests.support.database_link import database_link
from tests.support.gateway import Gateway, live
from tests.support.upstream import Upstream

QUESTION = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_an_address_is_remembered_for_a_minute_from_its_last_wrong_key() -> None:
    clock = Clock()
    unknown_keys = UnknownKeys(clock=clock)
    assert not unknown_keys.is_suspect("192.0.2.1", "a")
    unknown_keys.add("192.0.2.1")
    clock.now += REMEMBERED_SECONDS - 1
    assert unknown_keys.is_suspect("192.0.2.1", "a") and not unknown_keys.is_suspect("192.0.2.2", "a")
    unknown_keys.add("192.0.2.1")
    clock.now += REMEMBERED_SECONDS - 1
    assert unknown_keys.is_suspect("192.0.2.1", "a")
    clock.now += 1
    assert not unknown_keys.is_suspect("192.0.2.1", "a")


def test_a_key_that_was_found_is_no_strangers_for_a_minute() -> None:
    clock = Clock()
    unknown_keys = UnknownKeys(clock=clock)
    unknown_keys.add("192.0.2.1")
    unknown_keys.clear("a")
    clock.now += REMEMBERED_SECONDS - 1
    unknown_keys.add("192.0.2.1")
    assert unknown_keys.is_suspect("192.0.2.1", "b") and not unknown_keys.is_suspect("192.0.2.1", "a")
    clock.now += 1
    assert unknown_keys.is_suspect("192.0.2.1", "a")


def test_a_host_of_ipv6_is_its_network() -> None:
    unknown_keys = UnknownKeys()
    unknown_keys.add("2001:db8::1")
    assert unknown_keys.is_suspect("2001:db8::ffff:1", "a") and not unknown_keys.is_suspect(
        "2001:db8:0:1::1", "a"
    )


def test_the_oldest_is_forgotten_for_the_newest() -> None:
    unknown_keys = UnknownKeys()
    for number in range(MAX_REMEMBERED + 1):
        unknown_keys.add(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        unknown_keys.clear(str(number))
    assert not unknown_keys.is_suspect("10.0.0.0", "a") and unknown_keys.is_suspect("10.0.0.1", "a")
    assert unknown_keys.is_suspect("10.0.0.1", "0") and not unknown_keys.is_suspect("10.0.0.1", "1")


async def ask(gateway: Gateway, key: str, address: str, content: bytes) -> int:
    headers = {
        "authorization": f"Bearer {key}",
        "x-forwarded-for": address,
        "content-type": "application/json",
    }
    return (await gateway.http.post("/v1/chat/completions", headers=headers, content=content)).status_code


async def test_keys_from_that_address_are_looked_up_first(
    start_gateway: Callable[..., Awaitable[Gateway]], database: Database, upstream: Upstream
) -> None:
    async with database_link(database) as link:
        gateway = await start_gateway(
            database_url=link.url, trusted_proxies="127.0.0.0/8", **live(upstream.url)
        )
        user = await gateway.register(credits=1)

        async def trips(key: str, address: str, content: bytes = orjson.dumps(QUESTION)) -> tuple[int, int]:
            before = link.round_trips
            return await ask(gateway, key, address, content), link.round_trips - before

        assert [await trips(user.key, "192.0.2.7") for _ in range(3)][-1] == (200, 2)
        assert await trips(new_key("live"), "192.0.2.7") == (401, 1)
        assert [await trips(user.key, "192.0.2.7") for _ in range(2)] == [
            (200, 3),
            (200, 2),
        ]  # and is known from then on
        assert await trips(user.key, "192.0.2.7", b"{") == (400, 1)
        assert await trips(new_key("live"), "192.0.2.7") == (401, 1)
        assert await trips(user.key, "192.0.2.8") == (200, 2)


async def test_a_large_body_from_there_costs_next_to_nothing(
    start_gateway: Callable[..., Awaitable[Gateway]], upstream: Upstream
) -> None:
    gateway = await start_gateway(trusted_proxies="127.0.0.0/8", **live(upstream.url))
    user = await gateway.register(credits=1)
    assert await ask(gateway, user.key, "192.0.2.8", orjson.dumps(QUESTION)) == 200  # the model list is there
    large = orjson.dumps({**QUESTION, "messages": [{"role": "user", "content": "Hi"}] * 100_000})
    costs = []
    for _ in range(2):
        before = time.process_time()
        assert await ask(gateway, new_key("live"), "192.0.2.7", large) == 401
        costs.append(time.process_time() - before)
    assert costs[1] < costs[0] / 2
