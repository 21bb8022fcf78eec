"""Everything that the original system got wrong, each by name, with the tests that would fail if it were
wrong here.
"""

from __future__ import annotations

import ast
import asyncio
import datetime
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from config import load_configuration
from security import key_environment
from tests.support import ROOT
from tests.support.database import Database
from tests.support.database_link import database_link
from tests.support.gateway import ADMIN_KEY, Gateway, User
from tests.support.servers import eventually

TESTS = ROOT / "tests"
Start = Callable[..., Awaitable[Gateway]]

# What it got wrong, and the tests that would fail if it were so here; those without a file stand below.
WRONG = {
    # Keys
    "admin routes open to anyone": [
        "routes/test_api.py::test_a_user_s_key_opens_no_admin_route",
        "routes/test_every_endpoint.py::test_nobody_is_told_to_send_a_key",
    ],
    "clients chose their own initial credits": [
        "routes/test_api.py::test_credits_never_come_from_the_person_who_registers"
    ],
    "expired keys worked": ["test_an_expired_key_does_not_work"],
    "a deleted primary key still worked": ["routes/test_keys.py::test_a_deleted_primary_key_no_longer_works"],
    "rotation reported success and did nothing": [
        "routes/test_keys.py::test_rotation_changes_the_secret_and_keeps_id_and_settings"
    ],
    "update changed the caller's key": [
        "routes/test_keys.py::test_an_update_changes_the_key_of_the_path_and_no_other"
    ],
    "authentication loaded whole tables": [
        "sql/test_admission.py::test_one_admission_reads_no_table_from_end_to_end"
    ],
    "past a row cap an inactive key passed": ["test_an_inactive_key_behind_a_thousand_others_does_not_pass"],
    "keys were compared as plaintext": [
        "common/test_security.py::test_a_key_is_known_by_its_hmac_under_every_secret_the_current_first"
    ],
    "full keys in logs, lists and usage rows": ["test_no_full_key_in_logs_lists_or_any_row"],
    "hard-coded HMAC salt": ["test_two_installations_store_one_key_differently"],
    "a new Fernet key per process": ["test_what_one_process_encrypted_another_can_read"],
    "scopes never checked on chat": ["test_scopes_are_checked_on_chat"],
    "a key could mint a broader key": ["routes/test_keys.py::test_a_key_cannot_mint_a_broader_key"],
    "referer matched as substring": ["test_a_referer_is_not_matched_as_a_substring"],
    "no CIDR": ["sql/test_accounts.py::test_an_address_allowlist_admits_its_networks_only"],
    "X-Forwarded-For ignored or trusted blindly": [
        "test_x_forwarded_for_is_neither_ignored_nor_trusted_blindly"
    ],
    "suspended users still served": [
        "routes/test_account.py::test_a_suspended_user_is_refused_and_a_restored_one_served"
    ],
    "ended trials still served": [
        "routes/test_account.py::test_an_ended_trial_is_refused_until_credits_are_granted"
    ],
    # Money
    "402 was decided after the upstream answered": [
        "runtime/test_faults.py::test_no_credits_is_402_which_no_client_retries"
    ],
    "zero-token usage unrecorded": ["test_usage_of_zero_tokens_is_recorded"],
    "deduction not atomic": [
        "sql/test_admission.py::test_credits_for_k_requests_admit_exactly_k_of_many_at_once"
    ],
    "one flat price for all models": ["test_models_have_prices_of_their_own"],
    "a failed deduction only logged": [
        "runtime/test_faults.py::test_a_database_gone_at_settlement_costs_the_client_nothing_but_certainty",
        "runtime/test_faults.py::test_the_next_start_takes_up_what_the_journal_holds",
    ],
    # Limits
    "failed open": [
        "runtime/test_faults.py::test_without_a_database_nothing_is_sent_and_the_answer_says_why"
    ],
    "compared timestamps as strings": ["sql/test_limits.py::test_no_window_of_any_history_exceeds_a_limit"],
    "the admin's limits ignored for new keys": ["test_the_admin_s_limits_hold_for_new_keys"],
    "a lifetime max_requests reused as an hourly limit": [
        "sql/test_limits.py::test_max_requests_bounds_a_keys_life"
    ],
    # Proxy
    "two chats froze every other request": ["test_two_chats_freeze_nothing"],
    "upstream 429 became 500 with upstream text": [
        "proxy/test_completions.py::test_an_error_of_the_upstream_is_one_call_upstream_and_the_sdk_s_own_class",
    ],
    "stream: true returned one JSON body": [
        "proxy/test_streamed_completions.py::test_a_stream_ends_with_usage_and_what_was_charged"
    ],
    "tools, stop, seed, response_format, multimodal content dropped": [
        "proxy/test_completions.py::test_every_field_reaches_the_upstream_but_those_that_cross_tenants",
        "proxy/test_completions.py::test_an_image_is_seen_and_priced",
    ],
    # Rest
    "32 database round trips for one chat": [
        "runtime/test_faults.py::test_a_request_takes_two_round_trips_to_the_database"
    ],
    "whole tables summed in Python": ["test_no_table_is_summed_in_python"],
    "duplicate names answered 500": ["routes/test_keys.py::test_a_name_is_unique_among_a_users_keys"],
    "missing plans answered 500": ["routes/test_api.py::test_a_plan_is_assigned_or_said_to_be_missing"],
    "CORS * with credentials": ["routes/test_api.py::test_any_origin_may_ask_but_none_with_credentials"],
    "/health could not report a dead database": ["test_health_reports_a_dead_database"],
    "configuration unchecked on Vercel": ["test_the_configuration_is_checked_on_vercel_too"],
    "tests that did not even import": ["test_every_test_is_run_before_a_change_lands"],
}


@pytest.mark.parametrize("item", WRONG)
def test_each_has_its_test(item: str) -> None:
    for name in WRONG[item]:
        file, _, function = name.rpartition("::")
        tree = ast.parse((TESTS / file if file else Path(__file__)).read_text())
        assert function in {
            node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }, name


# Keys.


async def change_key(user: User, column: str, value: Any) -> None:
    await user.gateway.database.value(
        f"update public.api_keys_new set {column} = $2 where user_id = $1", user.id, value
    )


async def test_an_expired_key_does_not_work(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    await change_key(user, "expiration_date", datetime.datetime.now(datetime.UTC))
    assert (await user.chat()).status_code == 401
    response = await gateway.http.get("/user/balance", headers=user.headers)
    assert (response.status_code, response.json()["error"]["message"]) == (401, "This API key has expired.")


async def test_an_inactive_key_behind_a_thousand_others_does_not_pass(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    await gateway.database.value(
        """insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id)
           select $1, 'key ' || n, 'gw_live_', '0000', lpad(to_hex(n), 64, '0'), 'x'
           from generate_series(1, 3000) as n""",
        user.id,
    )
    last = await gateway.register(credits=1)
    assert (await last.chat()).status_code == 200
    await change_key(last, "is_active", False)
    assert (await last.chat()).status_code == 401


async def test_no_full_key_in_logs_lists_or_any_row(
    start_gateway: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = await start_gateway(log_level="debug", log_format="json")
    user = await gateway.register(credits=1)
    made = await gateway.http.post(
        "/user/api-keys", headers=user.headers, json={"key_name": "second", "revealable": True}
    )
    second = User(gateway, user.id, made.json()["api_key"])
    assert (await second.chat()).status_code == 200
    await gateway.http.get(f"/user/balance?key={second.key}")
    pages = [
        (await gateway.http.get(path, headers=headers)).text
        for path, headers in (
            ("/user/api-keys", user.headers), ("/user/api-keys/usage", user.headers),
            ("/user/api-keys/audit-logs", user.headers), ("/user/usage/records", user.headers),
            ("/user/profile", second.headers), ("/admin/keys", ADMIN), ("/admin/balance", ADMIN),
            ("/admin/usage/records?format=csv", ADMIN), ("/admin/audit-logs?format=csv", ADMIN),
        )
    ]  # fmt: skip
    tables = await gateway.database.rows(
        "select relname from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'"
    )
    rows = [
        await gateway.database.value(f"select string_agg(t::text, ' ') from public.{table['relname']} t")
        or ""
        for table in tables
    ]
    logged = capsys.readouterr().out
    assert '"event":"request"' in logged and len(tables) > 10
    for key in (user.key, second.key):
        assert key_environment(key) == "live"
        for text in (*pages, *rows, logged):
            assert key not in text and key[8:-6] not in text


ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


async def test_two_installations_store_one_key_differently(database: Database, start_gateway: Start) -> None:
    secrets = ("b2xk" + "A" * 39 + "=", "bmV3" + "A" * 39 + "=")
    one, two = (
        await start_gateway(key_hash_secrets=secrets[0]),
        await start_gateway(key_hash_secrets=secrets[1]),
    )
    user = await one.register()
    assert (await two.http.get("/user/balance", headers=user.headers)).status_code == 401


async def test_what_one_process_encrypted_another_can_read(start_gateway: Start) -> None:
    one, two = await start_gateway(), await start_gateway()
    user = await one.register()
    made = (
        await one.http.post(
            "/user/api-keys", headers=user.headers, json={"key_name": "second", "revealable": True}
        )
    ).json()
    response = await two.http.get(f"/user/api-keys/{made['key']['id']}/reveal", headers=user.headers)
    assert response.json()["api_key"] == made["api_key"]


async def test_scopes_are_checked_on_chat(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    await change_key(user, "scope_permissions", '{"read": ["*"], "write": ["keys"]}')
    refused = await user.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")
    assert await user.records() == []


@pytest.mark.parametrize(
    ("referer", "status"),
    [
        ("https://good.com/page", 200),
        ("https://evil.com/?good.com", 403),
        ("https://good.com.evil.com/", 403),
        ("https://evilgood.com/", 403),
        ("https://evil.com/#https://good.com", 403),
        (None, 403),
    ],
)
async def test_a_referer_is_not_matched_as_a_substring(
    gateway: Gateway, referer: str | None, status: int
) -> None:
    user = await gateway.register(credits=1)
    await change_key(user, "domain_referrers", ["good.com"])
    headers = {**user.headers, **({"referer": referer} if referer else {})}
    assert (await gateway.http.get("/user/balance", headers=headers)).status_code == status


async def test_x_forwarded_for_is_neither_ignored_nor_trusted_blindly(start_gateway: Start) -> None:
    plain, behind_proxy = await start_gateway(), await start_gateway(trusted_proxies="127.0.0.0/8")
    user = await plain.register(credits=1)
    await plain.database.value(
        "update public.api_keys_new set ip_allowlist = '{203.0.113.0/24}' where user_id = $1", user.id
    )

    async def status(gateway: Gateway, forwarded: str) -> int:
        headers = {**user.headers, "x-forwarded-for": forwarded}
        return (await gateway.http.get("/user/balance", headers=headers)).status_code

    assert await status(plain, "203.0.113.7") == 403
    assert await status(behind_proxy, "203.0.113.7") == 200
    assert await status(behind_proxy, "203.0.113.7, 198.51.100.1") == 403


# Money.


async def test_usage_of_zero_tokens_is_recorded(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    assert (await user.chat(scenario="cache-hit")).status_code == 200
    (record,) = await user.records()
    assert (record["prompt_tokens"], record["completion_tokens"], record["cost"], record["status"]) == (
        0,
        0,
        0,
        "completed",
    )
    await gateway.database.assert_books_balance()


async def test_models_have_prices_of_their_own(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    for model in ("openai/gpt-4o-mini", "anthropic/claude-haiku-4.5", "sandbox/fixed-price"):
        assert (await user.chat(model=model)).status_code == 200
    costs = {record["model"]: Decimal(str(record["cost"])) for record in await user.records()}
    assert len(set(costs.values())) == 3 and costs["sandbox/fixed-price"] == Decimal("0.5")


# Limits.


async def test_the_admin_s_limits_hold_for_new_keys(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    await gateway.admin(
        "POST", "/admin/limit", json={"user_id": user.id, "rate_limits": {"requests_per_hour": 2}}
    )
    made = (
        await gateway.http.post("/user/api-keys", headers=user.headers, json={"key_name": "second"})
    ).json()
    second = User(gateway, user.id, made["api_key"])
    assert [(await each.chat()).status_code for each in (second, user, second, user)] == [200, 200, 429, 429]


# Proxy.


async def test_two_chats_freeze_nothing(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    chats = [asyncio.create_task(user.chat(scenario="slow;ms=100;tokens=20", stream=True)) for _ in range(2)]
    running = "select count(*) from public.usage_records where status = 'pending'"
    await eventually(lambda: gateway.database.value(running), lambda count: count == 2)
    answers = await asyncio.gather(
        gateway.http.get("/health"), gateway.http.get("/user/balance", headers=user.headers), user.chat()
    )
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert not any(chat.done() for chat in chats)
    assert [answer.status_code for answer in await asyncio.gather(*chats)] == [200, 200]


# Rest.

MANY_RECORDS = """
insert into public.usage_records (request_id, user_id, key_id, mode, environment, endpoint, model,
    hold_nanos, markup, status,
                                  settlement_source, prompt_tokens, completion_tokens, created_at,
                                      expires_at, settled_at)
select gen_random_uuid(), k.user_id, k.id, 'sandbox', 'live', 'chat/completions', 'openai/gpt-4o-mini', 1, 1,
    'completed', 'usage', 3, 4,
       t, t, t
from public.api_keys_new k, generate_series(1, 3000), lateral (select now() as t) as at where k.user_id = $1
"""


@pytest.mark.parametrize("path", ["/user/monitor", "/user/usage", "/admin/monitor"])
async def test_no_table_is_summed_in_python(database: Database, start_gateway: Start, path: str) -> None:
    async with database_link(database) as link:
        gateway = await start_gateway(database_url=link.url)
        user = await gateway.register()
        headers = ADMIN if path.startswith("/admin") else user.headers

        async def asked() -> tuple[int, Any]:
            before = link.round_trips
            response = await gateway.http.get(path, headers=headers)
            assert response.status_code == 200 and len(response.content) < 20_000
            return link.round_trips - before, response.json()

        empty, _ = await asked()
        await database.value(MANY_RECORDS, user.id)  # more than a page of a hosted database
        full, report = await asked()
        assert full <= empty + 1
        total = report.get("usage_metrics", report.get("system_usage_metrics", {})).get(
            "total_requests", report.get("total", {}).get("requests")
        )
        assert total == 3000


async def test_health_reports_a_dead_database(database: Database, start_gateway: Start) -> None:
    async with database_link(database) as link:
        gateway = await start_gateway(database_url=link.url)
        assert (await gateway.http.get("/health")).json()["database"] == "connected"
        link.cut()
        answer = await gateway.http.get("/health")
        assert (answer.status_code, answer.json()["status"], answer.json()["database"]) == (
            503,
            "unhealthy",
            "unavailable",
        )
        link.mend()
        recovered = await eventually(
            lambda: gateway.http.get("/health"), lambda answer: answer.status_code == 200
        )
        assert recovered.json()["database"] == "connected"


def test_the_configuration_is_checked_on_vercel_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VERCEL", "1")
    monkeypatch.chdir(tmp_path)
    problems = " ".join(load_configuration().problems)
    for name in ("SUPABASE_URL", "KEY_HASH_SECRETS", "ENCRYPTION_KEYS", "ADMIN_API_KEY"):
        assert name in problems


def test_every_test_is_run_before_a_change_lands() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "$(PY) -m pytest -q" in (ROOT / "Makefile").read_text()
    # Tests of other people's clients: `make clients` runs them, and each needs its own packages.
    of_clients = TESTS / "clients" / "python"
    ours = {path for path in TESTS.rglob("test_*.py") if path.parent != of_clients}
    of_packages = {
        "benchmarks",
        "billing",
        "common",
        "house",
        "pricing",
        "proxy",
        "routes",
        "runtime",
        "upstream",
        "webhooks",
    }
    assert {path.parent.name for path in ours} == {"tests", "sql", "embedded", "sandbox", *of_packages}
    assert "make clients" in (ROOT / ".ci" / "run").read_text().splitlines()
    run = (TESTS / "clients" / "run.py").read_text()
    assert all(f'"python/{path.name}"' in run for path in of_clients.glob("test_*.py"))
