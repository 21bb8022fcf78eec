"""Only whole answers are stored for replay, and no failure to store one costs a hold or a second run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from sandbox.wire import dumps
from security import new_key
from tests.support.gateway import Gateway, User, live
from tests.support.upstream import GENERATION, TEXT, WRITER, Reply, Scripted, running_script

EVENTS = "text/event-stream"
CACHE = {"x-gateway-cache": "true"}
COST = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "cost": 0.0000123}
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture
async def script() -> AsyncIterator[Scripted]:
    async with running_script() as upstream:
        yield upstream


@pytest.fixture
async def scripted_gateway(start_gateway: Any, script: Scripted) -> Gateway:
    gateway: Gateway = await start_gateway(**live(script.url))
    return gateway


async def ask(user: User, headers: dict[str, str], **body: Any) -> Any:
    content = {"model": TEXT, "messages": HELLO, **body}
    return await user.gateway.http.post(
        "/v1/chat/completions", headers={**user.headers, **headers}, json=content
    )


def chunk(index: int, finish: str | None, **rest: Any) -> bytes:
    choice = {"index": index, "delta": {"content": "Hi"}, "finish_reason": finish}
    return b"data: " + dumps({"id": GENERATION, "model": TEXT, "choices": [choice], **rest}) + b"\n\n"


async def stored(gateway: Gateway) -> list[str]:
    return [
        row["kind"]
        for row in await gateway.database.rows("select kind from public.stored_answers where answer <> ''")
    ]


async def test_an_answer_that_the_balance_cut_short_is_not_cached(start_gateway: Any) -> None:
    gateway: Gateway = await start_gateway(signup_credits="0.0005")
    user = await gateway.register()
    headers = {**user.headers, **CACHE, "x-sandbox-scenario": "ordinary;tokens=5000"}
    body = {"model": "openai/gpt-4o-mini", "messages": HELLO}
    poor = await gateway.http.post("/v1/chat/completions", headers=headers, json=body)
    assert poor.status_code == 200 and int(poor.headers["x-gateway-max-tokens"]) < 4096
    await gateway.admin("POST", "/admin/add_credits", json={"user_id": user.id, "credits": 1})
    rich = await gateway.http.post("/v1/chat/completions", headers=headers, json=body)
    assert (rich.headers["x-gateway-cache"], rich.headers["x-gateway-max-tokens"]) == ("MISS", "4096")
    again = await gateway.http.post("/v1/chat/completions", headers=headers, json=body)
    assert again.headers["x-gateway-cache"] == "HIT"


async def test_an_answer_with_a_choice_that_failed_is_not_kept(
    scripted_gateway: Gateway, script: Scripted
) -> None:
    user = await scripted_gateway.register(credits=1)
    message = {"role": "assistant", "content": "Hi"}
    choices = [
        {"index": number, "finish_reason": why, "message": message}
        for number, why in enumerate(("stop", "error"))
    ]
    script.say(Reply([dumps({"id": GENERATION, "model": TEXT, "choices": choices, "usage": COST})]))
    assert (await ask(user, CACHE, n=2, max_tokens=50)).status_code == 200
    assert await stored(scripted_gateway) == []
    assert (await user.settled_record())["status"] == "failed"


async def test_a_stream_that_breaks_off_after_one_of_two_choices_is_not_whole(
    scripted_gateway: Gateway, script: Scripted
) -> None:
    user = await scripted_gateway.register(credits=1)
    script.say(
        Reply(
            [
                chunk(0, None),
                chunk(1, None, usage={**COST, "cost": 0.000001}),
                chunk(0, "stop", usage={**COST, "cost": 0.000002}),
            ],
            content_type=EVENTS,
        )
    )
    script.known_cost = "0.0000123"
    assert (await ask(user, CACHE, n=2, max_tokens=50, stream=True)).status_code == 200
    assert await stored(scripted_gateway) == []
    record = await user.settled_record()
    assert (record["status"], record["cost"]) == ("failed", 0.0000123)


async def test_a_stream_with_both_choices_is_whole_without_done(
    scripted_gateway: Gateway, script: Scripted
) -> None:
    user = await scripted_gateway.register(credits=1)
    script.say(Reply([chunk(0, None), chunk(1, "stop"), chunk(0, "stop", usage=COST)], content_type=EVENTS))
    assert (await ask(user, CACHE, n=2, max_tokens=50, stream=True)).status_code == 200
    assert await stored(scripted_gateway) == ["cache"]
    assert (await user.settled_record())["status"] == "completed"


async def transcribe(user: User, headers: dict[str, str], **fields: str) -> Any:
    files = {"file": ("a.wav", b"RIFF", "audio/wav")}
    data = {"model": WRITER, **fields}
    return await user.gateway.http.post(
        "/v1/audio/transcriptions", headers={**user.headers, **headers}, data=data, files=files
    )


async def test_the_same_form_under_another_boundary_is_the_same_request(
    scripted_gateway: Gateway, script: Scripted
) -> None:
    user = await scripted_gateway.register(credits=1)
    script.say(Reply([dumps({"text": "Hi", "usage": COST})]))
    once = {"idempotency-key": "one"}
    assert (await transcribe(user, once)).status_code == 200
    again = await transcribe(user, once)
    assert (again.status_code, again.headers.get("idempotent-replayed")) == (200, "true")
    assert (await transcribe(user, once, language="de")).status_code == 409
    assert len(script.sent) == 1


@pytest.mark.parametrize("headers", [{}, CACHE, {"idempotency-key": "one"}])
async def test_a_field_that_is_nested_too_deeply_holds_nothing(
    scripted_gateway: Gateway, script: Scripted, headers: dict[str, str]
) -> None:
    user = await scripted_gateway.register(credits=1)
    await scripted_gateway.database.value("update public.api_keys_new set cache_ttl_seconds = 60")
    script.say(Reply([dumps({"text": "Hi", "usage": COST})]))
    answer = await transcribe(user, headers, provider='{"x":' * 300 + "1" + "}" * 300)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "provider")
    assert (
        await scripted_gateway.database.value("select held_nanos from public.users where id = $1", user.id)
        == 0
    )


@pytest.mark.parametrize("name", ["x" * 257, ""])
async def test_the_end_user_of_a_request_is_validated_with_the_rest_of_it(
    gateway: Gateway, name: str
) -> None:
    """A key that is wrong is told before a header that is."""
    user = await gateway.register()
    stranger = User(gateway, 0, user.key[:-8] + "00000000")
    unknown = User(gateway, 0, new_key("live"))
    assert [
        (await ask(each, {"x-end-user": name}, model="openai/gpt-4o-mini")).status_code
        for each in (user, stranger, unknown)
    ] == [
        400,
        401,
        401,
    ]
