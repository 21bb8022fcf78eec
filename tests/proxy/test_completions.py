"""A completion, end to end: the official SDK against a gateway on a socket, with the sandbox as its
OpenRouter.
"""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from security import new_key
from tests.support.gateway import Gateway, User, staged_gateway, staged_upstream
from tests.support.upstream import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")


upstream, live_gateway = staged_upstream, staged_gateway


MINI = "openai/gpt-4o-mini"
HI: Any = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6"
    "kgAAAABJRU5ErkJggg=="
)


async def charged(user: User, upstream: Upstream) -> dict[str, Any]:
    """The user's one record; it costs what the upstream billed, nothing is held, and the books balance."""
    (record,) = await user.records()
    assert Decimal(str(record["cost"])) == upstream.sandbox.state.billed > 0
    assert record["status"] == "completed" and record["settlement_source"] == "usage"
    assert upstream.inferences == 1
    balance = await user.balance()
    assert balance["held"] == 0
    assert Decimal(str(balance["credits"])) == 1 - upstream.sandbox.state.billed
    await user.gateway.database.assert_books_balance()
    return record


def own_field(answer: ChatCompletion) -> dict[str, Any]:
    assert answer.model_extra is not None
    return dict(answer.model_extra["gateway_usage"])


async def test_a_completion_is_charged_what_the_upstream_billed(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    answer = await user.sdk().chat.completions.create(model=MINI, messages=HI)
    assert answer.choices[0].message.content and answer.usage is not None
    record = await charged(user, upstream)
    assert own_field(answer) == {
        "request_id": record["request_id"],
        "tokens_charged": answer.usage.total_tokens,
        "cost": record["cost"],
        "user_balance_after": (await user.balance())["credits"],
    }
    assert (record["model_used"], record["provider"], record["finish_reason"]) == (MINI, "OpenAI", "stop")
    assert record["generation_id"] == answer.id


async def test_the_sdk_without_async_gets_the_same(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)

    def complete() -> ChatCompletion:
        with openai.OpenAI(api_key=user.key, base_url=f"{live_gateway.url}/v1") as client:
            return client.chat.completions.create(model=MINI, messages=HI)

    assert own_field(await asyncio.to_thread(complete))["cost"] == (await charged(user, upstream))["cost"]


async def test_the_headers_tell_the_charge_the_balance_and_the_limits(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    limits = {"requests_per_minute": 5, "tokens_per_minute": 1000}
    await live_gateway.admin("POST", "/admin/limit", json={"user_id": user.id, "rate_limits": limits})
    raw = await user.sdk().chat.completions.with_raw_response.create(model=MINI, messages=HI)
    record = await charged(user, upstream)
    headers = raw.headers
    assert headers["x-request-id"] == record["request_id"]
    assert headers["x-generation-id"] == record["generation_id"]
    assert Decimal(headers["x-gateway-cost"]) == Decimal(str(record["cost"]))
    assert Decimal(headers["x-gateway-balance"]) == Decimal(str((await user.balance())["credits"]))
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("5", "4")
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert '"requests"' in headers["ratelimit"] and '"requests"' in headers["ratelimit-policy"]
    assert headers["x-gateway-max-tokens"] == "4096"
    assert "set-cookie" not in headers and "x-gateway-mode" not in headers


async def test_a_tool_is_called(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    answer = await user.sdk().chat.completions.create(model=MINI, messages=HI, tools=[WEATHER])
    assert answer.choices[0].message.tool_calls is not None
    (call,) = answer.choices[0].message.tool_calls
    assert (
        call.type == "function"
        and call.function.name == "get_weather"
        and "city" in json.loads(call.function.arguments)
    )
    assert (await charged(user, upstream))["finish_reason"] == "tool_calls"
    assert upstream.sent()["tools"] == [WEATHER]


async def test_an_image_is_seen_and_priced(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    content: Any = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": PIXEL}},
    ]
    answer = await user.sdk().chat.completions.create(
        model="openai/gpt-4o", messages=[{"role": "user", "content": content}]
    )
    assert answer.choices[0].message.content
    record = await charged(user, upstream)
    assert record["held"] > record["cost"]
    assert upstream.sent()["messages"][0]["content"] == content


async def test_an_answer_follows_a_schema(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    schema: Any = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "number", "strict": True, "schema": schema}}
    answer = await user.sdk().chat.completions.create(model=MINI, messages=HI, response_format=form)
    assert isinstance(json.loads(answer.choices[0].message.content or "")["n"], int)
    await charged(user, upstream)
    assert upstream.sent()["response_format"] == form


async def test_reasoning_is_passed_on_and_counted(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    answer = await user.sdk().chat.completions.create(
        model="deepseek/deepseek-r1", messages=HI, extra_body={"reasoning": {"effort": "low"}}
    )
    assert (answer.choices[0].message.model_extra or {})["reasoning"]
    record = await charged(user, upstream)
    assert record["reasoning_tokens"] > 0
    assert upstream.sent()["reasoning"] == {"effort": "low"}


async def test_openrouter_s_paths_and_anthropic_s_key_header_work_too(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    response = await live_gateway.http.post(
        "/api/v1/chat/completions", headers={"x-api-key": user.key}, json={"model": MINI, "messages": HI}
    )
    assert response.status_code == 200
    await charged(user, upstream)


async def test_a_fallback_model_is_recorded_and_priced_as_what_it_was(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = "fallback"
    models = {"models": [MINI, "mistralai/mistral-nemo"]}
    answer = await user.sdk().chat.completions.create(model=MINI, messages=HI, extra_body=models)
    assert answer.model == "mistralai/mistral-nemo"
    record = await charged(user, upstream)
    assert (record["model"], record["model_used"]) == (MINI, "mistralai/mistral-nemo")


# What goes out.


async def test_every_field_reaches_the_upstream_but_those_that_cross_tenants(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    fields = {
        "model": MINI,
        "messages": [
            {"role": "user", "content": "żółć 🎈", "name": "ada", "unknown": [None, 1.5e-7, {"deep": True}]}
        ],
        "temperature": 0.1,
        "top_p": 0.95,
        "seed": 2**53,
        "stop": ["\n\n"],
        "logit_bias": {"50256": -100},
        "metadata": {"a": "b"},
        "provider": {"order": ["Azure"], "allow_fallbacks": True, "data_collection": "deny"},
        "some_future_field": {"nested": [1, "two", None]},
        "transforms": [],
    }
    changed = {
        "user": "ada",
        "session_id": "s1",
        "prompt_cache_key": "k1",
        "debug": {"echo_upstream_body": True},
        "trace": {"trace_id": "t"},
        "max_completion_tokens": 50,
    }
    response = await live_gateway.http.post(
        "/v1/chat/completions", headers=user.headers, json={**fields, **changed}
    )
    assert response.status_code == 200, response.text
    sent = upstream.sent()
    assert {name: sent[name] for name in fields if name != "provider"} == {
        name: fields[name] for name in fields if name != "provider"
    }
    assert {name: value for name, value in sent["provider"].items() if name != "max_price"} == fields[
        "provider"
    ]
    assert set(sent["provider"]["max_price"]) >= {"prompt", "completion"}
    assert "debug" not in sent and "trace" not in sent
    for name in ("user", "session_id", "prompt_cache_key"):
        assert sent[name] != changed[name] and len(sent[name]) == 32
    assert sent["max_completion_tokens"] == 50
    await charged(user, upstream)


async def test_names_of_one_tenant_are_stable_and_not_those_of_another(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    names = set()
    for _ in range(2):
        user = await live_gateway.register(credits=1)
        for _ in range(2):
            assert (await user.chat(session_id="s", prompt_cache_key="k", user="u")).status_code == 200
            names.add(tuple(upstream.sent()[name] for name in ("session_id", "prompt_cache_key", "user")))
    assert len(names) == 2


async def test_no_header_of_the_client_reaches_the_upstream(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    theirs = {
        "cookie": "a=b",
        "x-openrouter-cache": "true",
        "x-openrouter-cache-clear": "true",
        "x-openrouter-metadata": "enabled",
        "x-session-id": "s",
        "http-referer": "https://client.example",
        "x-title": "Client",
        "user-agent": "client/1",
        "x-forwarded-for": "1.2.3.4",
        "x-stainless-os": "client-os",
        "idempotency-key": "client-key",
        "accept-encoding": "gzip, br",
        "anthropic-version": "1",
    }
    response = await live_gateway.http.post(
        "/v1/chat/completions", headers={**user.headers, **theirs}, json={"model": MINI, "messages": HI}
    )
    assert response.status_code == 200
    sent = upstream.sandbox.state.calls[-1].headers
    raw = upstream.sandbox.state.calls[-1].raw_headers
    assert (b"authorization", b"Bearer sk-or-v1-operator-secret") in raw
    assert not {name for name, value in theirs.items() if sent.get(name) == value}
    assert user.key.encode() not in b"".join(value for _, value in raw)
    assert sent["accept-encoding"] == "identity" and "http-referer" not in sent


async def test_an_output_without_limit_is_capped_at_what_credits_cover(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits="0.001")
    raw = await user.sdk().chat.completions.with_raw_response.create(model=MINI, messages=HI)
    granted = int(raw.headers["x-gateway-max-tokens"])
    assert 0 < granted < 4096
    assert upstream.sent()["max_tokens"] == granted
    (record,) = await user.records()
    assert Decimal(str(record["held"])) <= Decimal("0.001")


# What is refused: each class of error that the SDK knows, and never more calls upstream than one.


async def fails(
    user: User, kind: type[openai.APIStatusError], *, retries: int = 2, **changes: Any
) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        await user.sdk(max_retries=retries).chat.completions.create(
            **{"model": MINI, "messages": HI, **changes}
        )
    assert type(caught.value) is kind
    assert caught.value.code and caught.value.message
    return caught.value


async def test_a_wrong_request_is_a_bad_request_error(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    error = await fails(user, openai.BadRequestError, max_tokens=-1)
    assert (error.param, error.type) == ("max_tokens", "invalid_request_error")
    assert upstream.inferences == 0


async def test_a_wrong_key_is_an_authentication_error(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    error = await fails(User(live_gateway, user.id, new_key("live")), openai.AuthenticationError)
    assert error.code == "invalid_api_key" and upstream.inferences == 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("""scope_permissions = '{"read": ["*"], "write": ["embeddings"]}'""", "missing_scope"),
        ("ip_allowlist = '{10.1.0.0/16}'", "ip_not_allowed"),
        ("domain_referrers = '{*.example.com}'", "domain_not_allowed"),
        ("allowed_models = '{anthropic/*}'", "model_not_allowed"),
    ],
)
async def test_a_restricted_key_is_a_permission_denied_error(
    live_gateway: Gateway, upstream: Upstream, change: str, code: str
) -> None:
    user = await live_gateway.register(credits=1)
    async with live_gateway.database.owner() as owner:
        await owner.execute(f"update public.api_keys_new set {change} where user_id = {user.id}")
    assert (await fails(user, openai.PermissionDeniedError)).code == code
    assert upstream.inferences == 0


async def test_an_unknown_model_is_a_not_found_error(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    error = await fails(user, openai.NotFoundError, model="no/model")
    assert (error.code, error.param) == ("model_not_found", "model") and upstream.inferences == 0


async def test_no_credits_are_402_which_the_sdk_does_not_repeat(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register()
    error = await fails(user, openai.APIStatusError, max_tokens=100)
    assert (error.status_code, error.code, error.type) == (402, "insufficient_credits", "insufficient_quota")
    assert upstream.inferences == 0 and await user.records() == []


async def test_what_can_be_afforded_is_said_where_the_client_asked_for_more(live_gateway: Gateway) -> None:
    user = await live_gateway.register(credits="0.001")
    error = await fails(user, openai.APIStatusError, max_tokens=16000)
    body = error.response.json()
    affordable = body["gateway"]["affordable_max_tokens"]
    assert 0 < affordable < 16000 and str(affordable) in error.message and error.param == "max_tokens"
    answer = await user.sdk().chat.completions.create(model=MINI, messages=HI, max_tokens=affordable)
    assert answer.choices


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("chat/completions", "max_tokens"),
        ("chat/completions", "max_completion_tokens"),
        ("responses", "max_output_tokens"),
        ("messages", "max_tokens"),
    ],
)
async def test_what_is_affordable_is_told_by_the_name_of_the_clients_own_limit(
    live_gateway: Gateway, upstream: Upstream, path: str, limit: str
) -> None:
    user = await live_gateway.register(credits=0.001)
    question = {"input": "Hi"} if path == "responses" else {"messages": [{"role": "user", "content": "Hi"}]}
    response = await live_gateway.http.post(
        f"/v1/{path}", headers=user.headers, json={"model": MINI, **question, limit: 16_000}
    )
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (402, limit) and f"With `{limit}` of at most" in error[
        "message"
    ]
    assert upstream.inferences == 0


async def test_a_rate_limit_is_a_rate_limit_error_that_says_when(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    await live_gateway.admin(
        "POST", "/admin/limit", json={"user_id": user.id, "rate_limits": {"requests_per_minute": 1}}
    )
    assert (await user.chat()).status_code == 200
    error = await fails(user, openai.RateLimitError, retries=0)
    assert error.code == "rate_limit_exceeded" and 1 <= int(error.response.headers["retry-after"]) <= 70
    assert upstream.inferences == 1


@pytest.mark.parametrize(
    ("scenario", "kind"),
    [
        ("error-422", openai.UnprocessableEntityError),
        ("error-429", openai.RateLimitError),
        ("error-500", openai.InternalServerError),
        ("error-503", openai.InternalServerError),
        ("error-524", openai.InternalServerError),
        ("error-401", openai.InternalServerError),
        ("error-402", openai.InternalServerError),
        ("error-403", openai.PermissionDeniedError),
        ("cut", openai.InternalServerError),
    ],
)
async def test_an_error_of_the_upstream_is_one_call_upstream_and_the_sdk_s_own_class(
    live_gateway: Gateway, upstream: Upstream, scenario: str, kind: type[openai.APIStatusError]
) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = scenario
    await fails(user, kind, retries=0)
    assert upstream.inferences == 1
    record = await user.settled_record()
    assert Decimal(str(record["cost"])) == upstream.sandbox.state.billed
    await live_gateway.database.assert_books_balance()


async def test_a_retry_of_the_sdk_is_a_request_of_its_own(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = "error-500"
    request = user.sdk(max_retries=1).with_options(timeout=30).chat.completions
    with pytest.raises(openai.InternalServerError):
        await request.create(model=MINI, messages=HI)
    assert upstream.inferences == 2
    assert [(record["status"], record["cost"]) for record in await user.records()] == [("failed", 0)] * 2


# The sandbox for test keys.


async def test_a_test_key_is_answered_by_the_sandbox_for_nothing(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(environment="test")
    for streamed in (False, True):
        response = await user.chat(stream=streamed, scenario="cost-above-hold")
        assert response.status_code == 200 and response.headers["x-gateway-mode"] == "sandbox"
    assert (await user.chat(scenario="error-429")).status_code == 429
    odd = httpx.Headers([(b"x-sandbox-scenario", b"\xff"), (b"authorization", f"Bearer {user.key}".encode())])
    response = await live_gateway.http.post(
        "/v1/chat/completions", headers=odd, json={"model": MINI, "messages": HI}
    )
    assert response.status_code == 200
    assert upstream.inferences == 0
    records = await user.records()
    assert len(records) == 4 and {
        (record["cost"], record["held"], record["environment"]) for record in records
    } == {(0, 0, "test")}
    await live_gateway.database.assert_books_balance()
