"""Does anything of one tenant, or of the operator, reach another? Whose key goes upstream, and what keys that are worth less may not do."""

from __future__ import annotations

import asyncio

from rig import OPERATOR_KEY, Gateway, Upstream, User

OWN_KEYS = ["sk-or-v1-" + digit * 64 for digit in "ab"]


async def keep_own_key(user: User, key: str) -> None:
    answer = await user.gateway.http.put("/user/provider-key", headers=user.headers, json={"key": key})
    assert answer.status_code == 200, answer.text


def keys_sent(upstream: Upstream) -> list[str]:
    """Under whose keys completions went out, in order."""
    calls = [call for call in upstream.sandbox.state.calls if call.path == "/chat/completions"]
    return [value.decode().removeprefix("Bearer ") for call in calls for name, value in call.raw_headers if name == b"authorization"]


async def test_a_users_own_key_is_sent_with_nobody_elses_request(live_gateway: Gateway, upstream: Upstream) -> None:
    """A request builds on the first of its kind: what was put into one for a user must not stay for the next."""
    one, other, third = [await live_gateway.register(credits=1) for _ in range(3)]
    await keep_own_key(one, OWN_KEYS[0])
    await keep_own_key(other, OWN_KEYS[1])
    for user in (third, one, third, other, one, third):
        assert (await user.chat()).status_code == 200
    assert keys_sent(upstream) == [OPERATOR_KEY, OWN_KEYS[0], OPERATOR_KEY, OWN_KEYS[1], OWN_KEYS[0], OPERATOR_KEY]


async def test_nor_where_they_run_at_the_same_time(live_gateway: Gateway, upstream: Upstream) -> None:
    one, other = [await live_gateway.register(credits=1) for _ in range(2)]
    await keep_own_key(one, OWN_KEYS[0])
    answers = await asyncio.gather(*(user.chat() for _ in range(8) for user in (one, other)))
    assert {answer.status_code for answer in answers} == {200}
    assert [answer.headers.get("x-gateway-byok") for answer in answers] == ["true", None] * 8
    assert sorted(keys_sent(upstream)) == sorted([OWN_KEYS[0], OPERATOR_KEY] * 8)
