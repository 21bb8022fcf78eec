"""A user's own upstream key pays for that user's requests, and for nobody else's."""

from __future__ import annotations

import asyncio

import pytest
from rig import OPERATOR_KEY, Gateway, Upstream, User

OWN = {"ann": "sk-or-v1-anns-own", "bob": "sk-or-v1-bobs-own"}


async def with_own_key(gateway: Gateway, name: str) -> User:
    user = await gateway.register(credits=1)
    sealed = (await gateway.app.state.runtime.ready()).vault.encrypt(OWN[name])
    insert = "insert into public.provider_keys (user_id, encrypted_key, label) values ($1, $2, 'own')"
    await gateway.database.value(insert, user.id, sealed)
    return user


def accounts(upstream: Upstream) -> list[str]:
    """The keys that completions came under, in order."""
    calls = [call for call in upstream.sandbox.state.calls if call.path == "/chat/completions"]
    return [value.decode().removeprefix("Bearer ") for call in calls for name, value in call.raw_headers if name == b"authorization"]


@pytest.mark.parametrize("stream", [False, True])
async def test_after_a_users_own_key_the_others_go_out_under_the_operators_again(
    live_gateway: Gateway, upstream: Upstream, stream: bool
) -> None:
    plain, ann = await live_gateway.register(credits=1), await with_own_key(live_gateway, "ann")
    for user in (plain, ann, plain, ann):
        assert (await user.chat(stream=stream)).status_code == 200
    assert accounts(upstream) == [OPERATOR_KEY, OWN["ann"], OPERATOR_KEY, OWN["ann"]]


async def test_requests_at_the_same_time_go_out_each_under_its_own_key(live_gateway: Gateway, upstream: Upstream) -> None:
    users = {
        OPERATOR_KEY: await live_gateway.register(credits=1),
        OWN["ann"]: await with_own_key(live_gateway, "ann"),
        OWN["bob"]: await with_own_key(live_gateway, "bob"),
    }

    async def ask(key: str, user: User, number: int) -> None:
        answer = await user.chat(messages=[{"role": "user", "content": f"{key} {number}"}])
        assert answer.status_code == 200

    await asyncio.gather(*(ask(key, user, number) for number in range(8) for key, user in users.items()))
    calls = [call for call in upstream.sandbox.state.calls if call.path == "/chat/completions"]
    for call in calls:
        account = next(value.decode().removeprefix("Bearer ") for name, value in call.raw_headers if name == b"authorization")
        assert account.encode() in call.raw_body  # each prompt names the key that it should come under
    assert len(calls) == 24
