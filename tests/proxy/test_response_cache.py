"""A cached answer costs nothing, is found by the request that it answers, and never by another user."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import orjson
import pytest
import pytest_asyncio

from tests.support.gateway import Gateway, User, live, staged_gateway, staged_start, staged_upstream
from tests.support.kinds import KINDS, Kind
from tests.support.upstream import Upstream
from tests.support.users import scoped

pytestmark = pytest.mark.asyncio(loop_scope="module")

Start = Callable[..., Awaitable[Gateway]]
SHAPES = [pytest.param(kind, streamed, id=f"{kind.path}{'-streamed' if streamed else ''}")
          for kind in KINDS for streamed in ((False, True) if kind.streams else (False,))]  # fmt: skip
CHAT: dict[str, Any] = {
    "model": "openai/gpt-4o-mini",
    "messages": [{"role": "user", "content": "Say hello."}],
}
ON = {"x-gateway-cache": "true"}
EVERYTHING = {"read": ["*"], "write": ["*"]}


upstream, gateway, start_gateway = staged_upstream, staged_gateway, staged_start


@pytest_asyncio.fixture(loop_scope="module")
async def user(gateway: Gateway) -> User:
    return await gateway.register(credits=10)


async def ask(user: User, headers: dict[str, str] = ON, **body: Any) -> httpx.Response:
    response = await user.gateway.http.post(
        "/v1/chat/completions", headers={**user.headers, **headers}, json={**CHAT, **body}
    )
    status = response.headers.get("x-gateway-cache")
    assert status in (None, "HIT", "MISS") and response.headers.get("x-openrouter-cache-status") == status
    return response


def said(response: httpx.Response) -> str | None:
    assert response.status_code == 200, response.text
    status: str | None = response.headers.get("x-gateway-cache")
    return status


async def ages(user: User, seconds: int) -> None:
    """As if so much time had passed since the answers of this user were kept."""
    await user.gateway.database.value(
        "update public.stored_answers set created_at = created_at - make_interval(secs => $2), "
        "expires_at = expires_at - make_interval(secs => $2) where user_id = $1",
        user.id,
        float(seconds),
    )


# Found again.


@pytest.mark.parametrize(("kind", "streamed"), SHAPES)
async def test_the_second_time_it_comes_from_the_cache(
    gateway: Gateway, upstream: Upstream, kind: Kind, streamed: bool
) -> None:
    user = await gateway.register(credits=100)
    body = kind.body(random.Random(kind.path))
    content = kind.content({**body, "stream": True} if streamed else body)
    first, hit = [
        await gateway.http.post(kind.url, headers={**user.headers, **ON}, **content) for _ in range(2)
    ]
    assert (said(first), said(hit)) == ("MISS", "HIT")
    assert "age" not in first.headers and hit.headers["age"] == "0"
    record, paid = await user.records()
    assert (record["cost"], record["status"]) == (0, "completed") and paid["cost"] > 0
    assert record["request_id"] == hit.headers["x-request-id"]
    receipts = [
        (await gateway.http.get(f"/v1/receipts/{each['request_id']}", headers=user.headers)).json()
        for each in (record, paid)
    ]
    assert [receipt["cache_hit"] for receipt in receipts] == [True, False]
    (call,) = [call for call in upstream.sandbox.state.calls if call.path == kind.upstream_path]
    assert call.cost
    if kind.tells:
        charge = f'"request_id":"{record["request_id"]}","tokens_charged":0,"cost":0,'.encode()
        assert charge in hit.content
        assert len(hit.content.split(b'"gateway_usage"')) == len(first.content.split(b'"gateway_usage"')) == 2
        assert hit.content.partition(b'"gateway_usage"')[0] == first.content.partition(b'"gateway_usage"')[0]
    else:
        assert hit.content == first.content
    await gateway.database.assert_books_balance()


async def test_age_is_told_and_the_time_to_live_ends(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    assert said(await ask(user)) == "MISS"
    await ages(user, 298)
    hit = await ask(user)
    assert said(hit) == "HIT" and 298 <= int(hit.headers["age"]) <= 300
    await ages(user, 2)
    assert said(await ask(user)) == "MISS"
    own = {**ON, "x-gateway-cache-ttl": "86400"}
    assert said(await ask(user, {**own, "x-gateway-cache-clear": "true"})) == "MISS"
    await ages(user, 86_300)
    assert said(await ask(user, own)) == "HIT"
    await ages(user, 100)
    assert said(await ask(user, own)) == "MISS"
    assert upstream.inferences == 4


async def test_openrouters_headers_mean_ours_and_ours_come_first(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    theirs = {"x-openrouter-cache": "true", "x-openrouter-cache-ttl": "60"}
    assert said(await ask(user, theirs)) == "MISS"
    await ages(user, 61)
    assert said(await ask(user, theirs)) == "MISS"
    assert said(await ask(user)) == "HIT"
    assert said(await ask(user, {**theirs, "x-gateway-cache": "false"})) is None
    assert said(await ask(user, {**theirs, "x-openrouter-cache-clear": "TRUE"})) == "MISS"
    names = {name for call in upstream.sandbox.state.calls for name, _ in call.raw_headers}
    assert not [name for name in names if b"cache" in name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-gateway-cache", "yes"),
        ("x-openrouter-cache", ""),
        ("x-gateway-cache-ttl", "0"),
        ("x-gateway-cache-ttl", "86401"),
        ("x-gateway-cache-ttl", "1.5"),
        ("x-gateway-cache-ttl", "-1"),
        ("x-openrouter-cache-ttl", "²"),
        ("x-gateway-cache-clear", "1"),
    ],
)
async def test_a_header_that_means_nothing_is_refused_by_name(
    gateway: Gateway, upstream: Upstream, user: User, name: str, value: str
) -> None:
    headers: Any = {**user.headers, **ON, name: value.encode("latin-1")}
    if name == "x-openrouter-cache":
        del headers["x-gateway-cache"]
    response = await gateway.http.post("/v1/chat/completions", headers=headers, json=CHAT)
    assert response.status_code == 400 and response.json()["error"]["param"] == name
    assert upstream.inferences == 0 and await user.records() == []


async def test_the_order_of_fields_is_no_difference_and_everything_else_is(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    async def raw(body: bytes) -> str | None:
        return said(
            await gateway.http.post("/v1/chat/completions", headers={**user.headers, **ON}, content=body)
        )

    body = {**CHAT, "temperature": 0.5, "provider": {"sort": "price", "allow_fallbacks": True}}
    backwards = dict(reversed([*{**body, "provider": dict(reversed([*body["provider"].items()]))}.items()]))
    assert await raw(orjson.dumps(body)) == "MISS"
    assert await raw(orjson.dumps(backwards, option=orjson.OPT_INDENT_2)) == "HIT"
    for other in (
        {"temperature": 0.6},
        {"seed": 1},
        {"stream": False},
        {"stream": True},
        {"user": "ann"},
        {"messages": CHAT["messages"] * 2},
    ):
        assert await raw(orjson.dumps({**body, **other})) == "MISS", other
        assert await raw(orjson.dumps({**body, **other})) == "HIT", other


async def test_a_stream_is_never_the_answer_to_a_plain_request(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    await ask(user, stream=True)
    plain = await ask(user)
    assert said(plain) == "MISS" and plain.json()["object"] == "chat.completion"
    assert (await ask(user)).json()["choices"] == plain.json()["choices"]
    streamed = await ask(user, stream=True)
    assert said(streamed) == "HIT" and streamed.text.endswith("data: [DONE]\n\n")


async def test_another_file_of_the_same_form_is_another_question(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    async def transcribe(sound: bytes) -> str | None:
        files, fields = {"file": ("a.wav", sound, "audio/wav")}, {"model": "openai/gpt-4o-transcribe"}
        return said(
            await gateway.http.post(
                "/v1/audio/transcriptions", headers={**user.headers, **ON}, data=fields, files=files
            )
        )

    assert [await transcribe(sound) for sound in (b"RIFF one", b"RIFF one", b"RIFF two")] == [
        "MISS",
        "HIT",
        "MISS",
    ]


async def test_nobody_finds_what_others_asked(gateway: Gateway, upstream: Upstream, user: User) -> None:
    other, same = await gateway.register(credits=10), await scoped(user, EVERYTHING)
    testing = await scoped(user, EVERYTHING, environment_tag="test")
    assert said(await ask(user)) == "MISS"
    assert said(await ask(other)) == "MISS"
    assert said(await ask(testing)) == "MISS"
    assert said(await ask(same)) == "HIT"
    assert said(await ask(user)) == "HIT"
    forbidden = await scoped(user, EVERYTHING, allowed_models=["anthropic/*"])
    assert (await ask(forbidden)).status_code == 403


# What it costs.


async def test_a_hit_needs_no_credits_and_counts_as_a_request(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    await ask(user)
    spent = await user.balance()
    await gateway.admin(
        "POST", "/admin/adjust_credits", json={"user_id": user.id, "credits": -9, "reason": "test"}
    )
    correction = {"user_id": user.id, "credits": str(-(await balance(user))), "reason": "test"}
    await gateway.admin("POST", "/admin/adjust_credits", json=correction)
    assert (await user.balance())["credits"] == 0 < spent["credits"]
    assert (await ask(user, {"x-gateway-cache": "false"})).status_code == 402
    hit = await ask(user)
    assert (
        said(hit) == "HIT"
        and hit.headers["x-gateway-cost"] == "0"
        and hit.headers["x-gateway-balance"] == "0"
    )
    await gateway.admin(
        "POST", "/admin/limit", json={"user_id": user.id, "rate_limits": {"requests_per_minute": 4}}
    )
    for remaining in ("1", "0"):  # two are counted above
        hit = await ask(user)
        assert said(hit) == "HIT" and hit.headers["x-ratelimit-remaining-requests"] == remaining
    refused = await ask(user)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert upstream.inferences == 1


async def balance(user: User) -> Any:
    query = "select (credits_nanos / 1e9)::numeric from public.users where id = $1"
    return await user.gateway.database.value(query, user.id)


async def test_a_hit_is_whole_also_under_an_idempotency_key(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    await ask(user)
    keyed = {**ON, "idempotency-key": "a"}
    hit, again = await ask(user, keyed), await ask(user, keyed)
    assert said(hit) == "HIT" and "idempotent-replayed" not in hit.headers
    assert again.headers["idempotent-replayed"] == "true" and again.content == hit.content
    assert len(await user.records()) == 2 and upstream.inferences == 1


# What is kept.


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "scenario", ["error-500", "error-in-200", "stream-error;count=5", "cut;count=3", "provider-died"]
)
async def test_what_failed_is_not_kept(
    gateway: Gateway, upstream: Upstream, user: User, scenario: str, streamed: bool
) -> None:
    upstream.scenario = scenario
    await ask(user, stream=streamed)
    status = (await user.settled_record())["status"]
    upstream.scenario = ""
    assert said(await ask(user, stream=streamed)) == ("HIT" if status == "completed" else "MISS")


async def test_an_answer_that_credits_cut_short_is_not_kept(gateway: Gateway, upstream: Upstream) -> None:
    """With more credits it would be another one."""
    poor = await gateway.register(credits="0.0002")
    upstream.scenario = "ordinary;tokens=4000"
    cut = await ask(poor)
    assert said(cut) == "MISS" and cut.json()["choices"][0]["finish_reason"] == "length"
    assert int(cut.headers["x-gateway-max-tokens"]) == cut.json()["usage"]["completion_tokens"]
    await gateway.admin("POST", "/admin/add_credits", json={"user_id": poor.id, "credits": 5})
    whole = await ask(poor)
    assert said(whole) == "MISS" and len(whole.content) > len(cut.content)
    assert said(await ask(poor)) == "HIT"
    limited = await ask(poor, max_tokens=20)
    assert (
        limited.json()["choices"][0]["finish_reason"] == "length"
        and said(await ask(poor, max_tokens=20)) == "HIT"
    )


async def test_without_being_asked_nothing_is_stored(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    assert said(await ask(user, {})) is None
    assert said(await ask(user, {})) is None
    assert upstream.inferences == 2
    assert (
        await gateway.database.value("select count(*) from public.stored_answers where user_id = $1", user.id)
        == 0
    )


async def test_what_is_stored_is_unreadable(gateway: Gateway, upstream: Upstream, user: User) -> None:
    response = await ask(user, messages=[{"role": "user", "content": "my secret question"}])
    text = response.json()["choices"][0]["message"]["content"]
    (row,) = await gateway.database.rows(
        "select a::text as whole from public.stored_answers a where user_id = $1", user.id
    )
    assert text not in row["whole"] and "secret" not in row["whole"] and "gpt-4o" not in row["whole"]


# Keys that use it by default.


async def test_a_key_that_caches_by_default_may_be_made_changed_and_overridden(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    caching = await scoped(user, EVERYTHING, cache_ttl_seconds=60)
    headers = caching.headers
    (listed,) = [
        key
        for key in (await gateway.http.get("/user/api-keys", headers=headers)).json()["keys"]
        if key["cache_ttl_seconds"]
    ]
    assert listed["cache_ttl_seconds"] == 60
    assert [said(await ask(caching, {})) for _ in range(3)] == ["MISS", "HIT", "HIT"]
    assert said(await ask(caching, {"x-gateway-cache": "false"})) is None
    assert said(await ask(caching, {"x-gateway-cache-clear": "true"})) == "MISS"
    assert said(await ask(caching, {})) == "HIT"
    assert said(await ask(user, {})) is None
    await ages(user, 61)
    assert said(await ask(caching, {})) == "MISS"
    path = f"/user/api-keys/{listed['id']}"
    changed = await gateway.http.put(path, headers=headers, json={"cache_ttl_seconds": 7200})
    assert changed.status_code == 200 and changed.json()["updated_key"]["cache_ttl_seconds"] == 7200
    assert said(await ask(caching, {}, seed=1)) == "MISS"
    await ages(user, 7100)
    assert said(await ask(caching, {}, seed=1)) == "HIT"
    renamed = await gateway.http.put(path, headers=headers, json={"key_name": "renamed"})
    assert renamed.json()["updated_key"]["cache_ttl_seconds"] == 7200
    rotated = await gateway.http.post(f"{path}/rotate", headers=headers, json={})
    caching = User(gateway, user.id, rotated.json()["api_key"])
    assert said(await ask(caching, {}, seed=2)) == "MISS" and said(await ask(caching, {}, seed=2)) == "HIT"
    off = await gateway.http.put(path, headers=caching.headers, json={"cache_ttl_seconds": None})
    assert off.json()["updated_key"]["cache_ttl_seconds"] is None
    assert said(await ask(caching, {}, seed=2)) is None
    assert (await gateway.http.get(path, headers=caching.headers)).json()["cache_ttl_seconds"] is None


@pytest.mark.parametrize("ttl", [0, -1, 86_401, 1.5, "60", True])
async def test_an_invalid_time_to_live_is_refused_by_name(gateway: Gateway, user: User, ttl: Any) -> None:
    body = {"key_name": "cached", "cache_ttl_seconds": ttl}
    listed = (await gateway.http.get("/user/api-keys", headers=user.headers)).json()["keys"]
    for method, path in (("POST", "/user/api-keys"), ("PUT", f"/user/api-keys/{listed[0]['id']}")):
        response = await gateway.http.request(method, path, headers=user.headers, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "cache_ttl_seconds")
    assert (await gateway.http.get("/user/api-keys", headers=user.headers)).json()["keys"] == listed


async def test_instances_share_it(start_gateway: Start, upstream: Upstream) -> None:
    one, other = await start_gateway(**live(upstream.url)), await start_gateway(**live(upstream.url))
    user = await one.register(credits=10)
    elsewhere = User(other, user.id, user.key)
    assert [said(await ask(each)) for each in (user, elsewhere, user)] == ["MISS", "HIT", "HIT"]
