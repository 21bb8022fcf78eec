"""Nothing of one tenant, or of the operator, reaches another: whose key goes upstream, and what a key of
lower rank may not do.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from gateway.upstream.errors import sanitised_error
from routes.http.pagination import cursor_of
from sandbox import create_app
from security import new_key
from tests.support.gateway import ADMIN_KEY, OPERATOR_KEY, Gateway, User, live
from tests.support.servers import served
from tests.support.upstream import Upstream

OWN_KEYS = ["sk-or-v1-" + digit * 64 for digit in "ab"]
NATIVE_FILES = {"id": "file-parser", "pdf": {"engine": "native"}}
CHANGES_OF_THE_ACCOUNT = [
    ("PUT", "/user/profile", {"email": "thief@example.com"}),
    ("DELETE", "/user/plan", None),
]


async def keep_own_key(user: User, key: str) -> None:
    response = await user.gateway.http.put("/user/provider-key", headers=user.headers, json={"key": key})
    assert response.status_code == 200, response.text


def keys_sent(upstream: Upstream) -> list[str]:
    """Under whose keys completions went out, in order."""
    calls = [call for call in upstream.sandbox.state.calls if call.path == "/chat/completions"]
    return [
        value.decode().removeprefix("Bearer ")
        for call in calls
        for name, value in call.raw_headers
        if name == b"authorization"
    ]


async def test_a_users_own_key_is_sent_with_nobody_elses_request(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    """A request builds on the first of its kind: what one user put into it must not reach the next."""
    one, other, third = [await live_gateway.register(credits=1) for _ in range(3)]
    await keep_own_key(one, OWN_KEYS[0])
    await keep_own_key(other, OWN_KEYS[1])
    for user in (third, one, third, other, one, third):
        assert (await user.chat()).status_code == 200
    assert keys_sent(upstream) == [
        OPERATOR_KEY,
        OWN_KEYS[0],
        OPERATOR_KEY,
        OWN_KEYS[1],
        OWN_KEYS[0],
        OPERATOR_KEY,
    ]


async def test_nor_where_they_run_at_the_same_time(live_gateway: Gateway, upstream: Upstream) -> None:
    plain, one, other = [await live_gateway.register(credits=1) for _ in range(3)]
    await keep_own_key(one, OWN_KEYS[0])
    await keep_own_key(other, OWN_KEYS[1])
    mine = {OPERATOR_KEY: plain, OWN_KEYS[0]: one, OWN_KEYS[1]: other}

    async def ask(key: str, number: int) -> str | None:
        response = await mine[key].chat(
            messages=[{"role": "user", "content": f"{key} {number}"}]
        )  # which key it should come under
        assert response.status_code == 200
        told: str | None = response.headers.get("x-gateway-byok")
        return told

    heard = await asyncio.gather(*(ask(key, number) for number in range(8) for key in mine))
    assert heard == [None, "true", "true"] * 8
    calls = [call for call in upstream.sandbox.state.calls if call.path == "/chat/completions"]
    assert len(calls) == 24 and all(
        key.encode() in call.raw_body for key, call in zip(keys_sent(upstream), calls, strict=True)
    )


# What keys that are handed out for trying things, and replaced secrets, may not do.


async def key_of(user: User, **order: object) -> User:
    response = await user.gateway.http.post("/user/api-keys", headers=user.headers, json=order)
    assert response.status_code == 200, response.text
    return User(user.gateway, response.json()["key"]["id"], response.json()["api_key"])


async def ask(user: User, method: str, path: str, body: object = None) -> tuple[int, str | None]:
    """The status, and the error's code."""
    response = await user.gateway.http.request(method, path, headers=user.headers, json=body)
    return response.status_code, None if response.is_success else response.json()["error"]["code"]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES_OF_THE_ACCOUNT)
async def test_a_test_key_changes_nothing_of_the_account(
    gateway: Gateway, method: str, path: str, body: object
) -> None:
    user = await gateway.register()
    tried = await key_of(user, key_name="tried", environment_tag="test")
    assert await ask(tried, method, path, body) == (403, "forbidden")


@pytest.mark.parametrize(("method", "path", "body"), CHANGES_OF_THE_ACCOUNT)
async def test_nor_does_a_secret_that_was_replaced(
    gateway: Gateway, method: str, path: str, body: object
) -> None:
    user = await gateway.register()
    keys = (await gateway.http.get("/user/api-keys", headers=user.headers)).json()["keys"]
    rotated = await ask(user, "POST", f"/user/api-keys/{keys[0]['id']}/rotate", {"grace_period": 3600})
    assert rotated == (200, None)
    assert await ask(user, method, path, body) == (403, "missing_scope")


@pytest.mark.parametrize("environment", ["test", "staging"])
async def test_a_key_of_a_lesser_environment_revokes_no_live_one(gateway: Gateway, environment: str) -> None:
    user = await gateway.register()
    lesser = await key_of(user, key_name="lesser", environment_tag=environment)
    live = await key_of(user, key_name="live")
    revocation = {"confirmation": "DELETE_KEY"}
    assert await ask(lesser, "DELETE", f"/user/api-keys/{live.id}", revocation) == (403, "missing_scope")
    assert await ask(live, "GET", "/user/balance") == (200, None)
    assert await ask(lesser, "DELETE", f"/user/api-keys/{lesser.id}", revocation) == (200, None)
    assert await ask(user, "DELETE", f"/user/api-keys/{live.id}", revocation) == (200, None)


async def test_of_a_webhooks_url_the_log_keeps_no_secret(gateway: Gateway) -> None:
    user = await gateway.register()
    made = await gateway.http.post(
        "/user/webhooks",
        headers=user.headers,
        json={"url": "https://hooks.example.com/T0/s3cret?token=s3cret"},
    )
    path = f"/user/webhooks/{made.json()['webhook']['id']}"
    assert await ask(user, "PUT", path, {"url": "https://hooks.example.com?token=s3cret"}) == (200, None)
    assert await ask(user, "DELETE", path) == (200, None)
    logs = (await gateway.http.get("/user/api-keys/audit-logs", headers=user.headers)).json()["logs"]
    urls = [log["details"].get("url") for log in logs if log["action"].endswith("_webhook")]
    assert urls == ["https://hooks.example.com"] * 3


# What nobody is told.


@pytest.mark.parametrize(("method", "path"), [("GET", "/user/balance"), ("POST", "/v1/chat/completions")])
async def test_the_administrators_key_is_recognised_only_where_guesses_are_counted(
    gateway: Gateway, method: str, path: str
) -> None:
    answers = [
        await gateway.http.request(method, path, headers={"x-api-key": key}, json={})
        for key in (ADMIN_KEY, ADMIN_KEY + "x")
    ]
    errors = [answer.json()["error"] for answer in answers]
    assert errors[0] == errors[1] and "administrator" in errors[0]["message"]


async def test_an_unknown_key_is_told_nothing_of_its_end_user(gateway: Gateway) -> None:
    user, stranger = await gateway.register(), User(gateway, 0, new_key("live"))
    assert (
        await user.chat()
    ).status_code == 200  # the models are known now, and no reason to ask about the key first
    assert (await stranger.chat(user="a\x00b")).status_code == 401
    refused = (await user.chat(user="a\x00b")).json()["error"]
    assert (refused["code"], refused["param"]) == ("invalid_request", "user")


# What somebody may take of us without a key.


async def test_a_body_that_never_comes_whole_is_not_waited_for(
    start_gateway: Callable[..., Awaitable[Gateway]],
) -> None:
    """Its key is one by its looks only: what has come of it would be kept for as long as anybody likes."""
    gateway = await start_gateway(request_deadline_seconds=0.2)
    url = httpx.URL(gateway.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        "host: gateway",
        f"authorization: Bearer {new_key('live')}",
        "content-length: 1000000",
    )
    writer.write("\r\n".join((*lines, "", '{"model":')).encode())
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 400 ") and b"body_too_slow" in answer


# What lies in the operator's account.


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {"file_id": "file_1"}},
        {"type": "input_file", "file_id": "file_1"},
        {"type": "input_image", "file_id": "file_1"},
    ],
)
async def test_a_file_of_the_operators_account_cannot_be_named(
    live_gateway: Gateway, upstream: Upstream, part: dict[str, object]
) -> None:
    user = await live_gateway.register(credits=100)
    response = await user.chat(messages=[{"role": "user", "content": [part]}], plugins=[NATIVE_FILES])
    assert (response.status_code, "file_id" in response.json()["error"]["message"]) == (400, True), (
        response.text
    )
    assert upstream.inferences == 0


def test_of_the_operators_limits_a_stream_says_nothing() -> None:
    """As an answer's status does; in a stream, the same comes as an event."""
    error = sanitised_error({"code": 403, "message": "Key limit exceeded (monthly limit: $250)."})
    assert error["code"] == "upstream_unavailable" and "250" not in str(error)
    assert "flagged" in str(sanitised_error({"code": 403, "message": "Your input was flagged."})["message"])


# What would reach the database.


@pytest.mark.parametrize("unprintable", ["\x00", "\n", "\u202e"])
async def test_a_model_s_name_is_printable_whatever_the_sandbox_takes_after_a_colon(
    gateway: Gateway, unprintable: str
) -> None:
    user = await gateway.register()
    for named in (
        {"model": f"openai/gpt-4o-mini:ordinary;{unprintable}"},
        {"models": [f"openai/gpt-4o-mini:ordinary;{unprintable}"]},
    ):
        refused = await user.chat(**named)
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, next(iter(named)))


MOMENTS = [
    "2026-01-01T00:00:00+23:00",
    "2026-01-01T00:00:00-23:59",
    "0001-01-01T00:00:00+14:00",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59-14:00",
]
LISTS = ["/usage", "/usage/records", "/transactions"]


@pytest.mark.parametrize("moment", MOMENTS)
async def test_any_time_of_any_zone_is_a_range(gateway: Gateway, moment: str) -> None:
    user = await gateway.register()
    logs = [
        ("/user/api-keys/audit-logs", "start_date", "end_date"),
        ("/admin/audit-logs", "start_date", "end_date"),
    ]
    for path, *names in [
        (f"/{who}{name}", "start", "end") for who in ("user", "admin") for name in LISTS
    ] + logs:
        key = user.key if path.startswith("/user") else ADMIN_KEY
        for name in names:
            response = await gateway.http.get(path, params={name: moment}, headers={"x-api-key": key})
            assert response.status_code in (200, 400), (path, name, response.text)


async def test_the_zone_of_a_time_counts(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    made = datetime.datetime.fromisoformat(
        (await user.gateway.http.get("/user/transactions", headers=user.headers)).json()["transactions"][0][
            "created_at"
        ]
    )
    far = datetime.timezone(datetime.timedelta(hours=23))
    for shift, count in ((-1, 1), (1, 0)):
        start = (made + datetime.timedelta(seconds=shift)).astimezone(far).isoformat()
        response = await gateway.http.get(
            "/user/transactions", params={"start": start, "limit": 1}, headers=user.headers
        )
        assert len(response.json()["transactions"]) == count, start


@pytest.mark.parametrize(
    "moment", ["2026-01-01T00:00:00+23:00", "0001-01-01T00:00:00+14:00", "2026-01-01T00:00:00"]
)
async def test_a_cursor_of_any_time_is_valid_or_refused(gateway: Gateway, moment: str) -> None:
    user = await gateway.register()
    cursor = cursor_of(f"{moment} 0199f0a0-0000-7000-8000-000000000000")
    response = await gateway.http.get("/user/usage/records", params={"cursor": cursor}, headers=user.headers)
    assert response.status_code in (200, 400), response.text


async def test_a_zone_that_only_this_machine_knows_is_refused(gateway: Gateway) -> None:
    user = await gateway.register()
    response = await gateway.http.get("/user/usage", params={"timezone": "localtime"}, headers=user.headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "timezone")


@pytest.mark.parametrize("code", [401, 402])
async def test_trouble_with_a_users_own_key_is_theirs_whatever_status_it_comes_with(
    start_gateway: Callable[..., Awaitable[Gateway]], code: int
) -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        """An OpenRouter that says it in the body of a 200."""
        completes = scope["type"] == "http" and scope["path"].endswith("/chat/completions")
        answer = Response(
            f'{{"error":{{"code":{code},"message":"No credits"}}}}', media_type="application/json"
        )
        await (answer if completes else create_app())(scope, receive, send)

    async with served(refuse) as url:
        gateway = await start_gateway(**live(f"{url}/api/v1"))
        user = await gateway.register()
        await keep_own_key(user, OWN_KEYS[0])
        refused = await user.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "provider_key_refused")
