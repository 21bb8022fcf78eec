"""Who may use a key, from where and for what; and how accounts and keys of older formats are taken over."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.support.sql_client import Account, Client, hash_of, registration, request

pytestmark = pytest.mark.asyncio(loop_scope="module")

LATER = datetime(2999, 1, 1, tzinfo=UTC)
PAST = datetime(2020, 1, 1, tzinfo=UTC)


async def outcome(client: Client, account: Account, **changes: Any) -> str:
    return str((await client.admit_one(account, **changes))["outcome"])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"is_active": False}, "INACTIVE_KEY"),
        ({"revoked_at": PAST}, "INACTIVE_KEY"),
        ({"expiration_date": PAST}, "EXPIRED_KEY"),
        ({"expiration_date": LATER}, "admitted"),
        ({"allowed_models": []}, "MODEL_NOT_ALLOWED"),
        ({"allowed_models": ["openai/gpt-4o"]}, "MODEL_NOT_ALLOWED"),
        ({"allowed_models": ["openai/gpt-4o*"]}, "admitted"),
        ({"allowed_models": ["x", "openai/gpt-4o-mini"]}, "admitted"),
        ({"scope_permissions": "{}"}, "SCOPE_NOT_ALLOWED"),
        ({"scope_permissions": '{"write": []}'}, "SCOPE_NOT_ALLOWED"),
        ({"scope_permissions": '{"read": ["*"]}'}, "SCOPE_NOT_ALLOWED"),
        ({"scope_permissions": '{"write": ["images"]}'}, "SCOPE_NOT_ALLOWED"),
        ({"scope_permissions": '{"write": ["chat"]}'}, "admitted"),
        ({"scope_permissions": '{"write": "*"}'}, "admitted"),
    ],
    ids=str,
)
async def test_a_key_is_used_only_as_it_allows(
    client: Client, columns: dict[str, Any], expected: str
) -> None:
    account = await client.register(credits_nanos=10**6)
    await client.change_key(account, **columns)
    assert await outcome(client, account) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"is_active": False}, "ACCOUNT_SUSPENDED"),
        ({"deleted_at": PAST}, "INACTIVE_KEY"),
        ({"subscription_status": "trial", "trial_expires_at": PAST}, "trial_expired"),
        ({"subscription_status": "trial", "trial_expires_at": LATER}, "admitted"),
        ({"subscription_status": "active", "trial_expires_at": PAST}, "admitted"),
    ],
    ids=str,
)
async def test_an_account_is_used_only_while_it_may_be(
    client: Client, columns: dict[str, Any], expected: str
) -> None:
    account = await client.register(credits_nanos=10**6)
    await client.change_user(account, **columns)
    assert await outcome(client, account) == expected


@pytest.mark.parametrize(
    ("allowlist", "address", "allowed"),
    [
        (["192.0.2.7/32"], "192.0.2.7", True),
        (["192.0.2.7/32"], "192.0.2.8", False),
        (["10.0.0.0/8", "192.0.2.0/24"], "192.0.2.255", True),
        (["192.0.2.0/24"], "192.0.3.0", False),
        (["2001:db8::/32"], "2001:db8:ffff::1", True),
        (["2001:db8::/32"], "2001:db9::1", False),
        (["0.0.0.0/0"], "2001:db8::1", False),
        (["::/0"], "192.0.2.7", False),
        (["192.0.2.0/24"], None, False),
    ],
)
async def test_an_address_allowlist_admits_its_networks_only(
    client: Client, allowlist: list[str], address: str | None, allowed: bool
) -> None:
    account = await client.register(credits_nanos=10**6)
    await client.value(
        "update public.api_keys_new set ip_allowlist = $2::text[]::cidr[] where id = $1",
        account.key_id,
        allowlist,
    )
    assert await outcome(client, account, address=address) == ("admitted" if allowed else "IP_NOT_ALLOWED")


@pytest.mark.parametrize(
    ("domain", "allowed"),
    [
        ("good.com", True),
        ("a.sub.org", True),
        ("a.b.sub.org", True),
        ("sub.org", False),
        (".sub.org", False),
        ("evilsub.org", False),
        ("sub.org.evil.com", False),
        ("evil.com", False),
        ("evil-good.com", False),
        ("good.com.evil.com", False),
        ("www.good.com", False),
        ("evil.com/?good.com", False),
        ("%.sub.org.x", False),
        ("", False),
        (None, False),
    ],
)
async def test_a_domain_allowlist_admits_exact_hosts_and_real_subdomains(
    client: Client, domain: str | None, allowed: bool
) -> None:
    account = await client.register(credits_nanos=10**6)
    await client.change_key(account, domain_referrers=["good.com", "*.sub.org"])
    assert await outcome(client, account, domain=domain) == ("admitted" if allowed else "DOMAIN_NOT_ALLOWED")


async def test_every_model_that_a_request_can_reach_must_be_allowed(client: Client) -> None:
    account = await client.register(credits_nanos=10**6)
    await client.change_key(account, allowed_models=["openai/*"])
    assert await outcome(client, account, models=["openai/a", "openai/b"]) == "admitted"
    assert await outcome(client, account, models=["openai/a", "evil/b"]) == "MODEL_NOT_ALLOWED"
    assert await outcome(client, account, models=["openai/a", None]) == "MODEL_NOT_ALLOWED"


@pytest.mark.parametrize(
    ("prefix", "expected"), [("live", "admitted"), ("test", "INVALID_KEY"), (None, "admitted")]
)
async def test_a_key_of_another_environment_than_its_prefix_does_not_exist(
    client: Client, prefix: str | None, expected: str
) -> None:
    account = await client.register(credits_nanos=10**6)
    assert await outcome(client, account, prefix_environment=prefix) == expected


async def test_admin_scope_is_worth_nothing_without_the_role(client: Client) -> None:
    account = await client.register()
    await client.change_key(account, scope_permissions='{"admin": ["*"], "write": ["*"]}')
    assert await outcome(client, account, verb="admin", holds=False) == "SCOPE_NOT_ALLOWED"
    await client.change_user(account, role="admin")
    assert await outcome(client, account, verb="admin", holds=False) == "verified"


async def test_a_previous_key_works_until_its_grace_ends(client: Client) -> None:
    account = await client.register(credits_nanos=10**6)
    old, new = account.hash, hash_of(f"rotated {account.id}")
    await client.change_key(
        account,
        key_hash=new,
        previous_key_hash=old,
        previous_hash_secret_id="secret-1",
        previous_valid_until=LATER,
    )
    assert [await outcome(client, account), await outcome(client, account, hashes=[new])] == [
        "admitted",
        "admitted",
    ]
    await client.change_key(account, previous_valid_until=PAST)
    assert [await outcome(client, account), await outcome(client, account, hashes=[new])] == [
        "INVALID_KEY",
        "admitted",
    ]


async def test_a_key_found_by_an_older_secret_is_stored_under_the_newest(client: Client) -> None:
    account = await client.register(credits_nanos=10**6)
    newest = hash_of(f"under secret 2: {account.id}")
    item = {"hashes": [newest, account.hash], "secret_id": "secret-2"}
    assert await outcome(client, account, **item) == "admitted"
    key = (await client.rows("select * from public.api_keys_new where id = $1", account.key_id))[0]
    assert (key["key_hash"], key["hash_secret_id"]) == (newest, "secret-2")
    assert await outcome(client, account, hashes=[newest], secret_id="secret-2") == "admitted"
    assert "secret-2" in await client.call("key_secrets_in_use")


# Keys of older formats.


async def legacy(client: Client, **columns: Any) -> tuple[Account, dict[str, Any]]:
    """An imported key, and the fields of an item that presents it."""
    account = await client.register(credits_nanos=10**6)
    text = f"sk-old-{uuid.uuid4()}"
    await client.value(
        "insert into public.api_keys (user_id, key_sha256, key_name, key_prefix, last4, is_active) "
        "values ($1, $2, 'old', 'sk-', 'abcd', $3)",
        account.id,
        hash_of(text),
        columns.get("is_active", True),
    )
    return account, {"hashes": [hash_of(f"hmac {text}")], "legacy_hash": hash_of(text)}


async def test_an_older_key_is_moved_on_first_use(client: Client) -> None:
    account, item = await legacy(client)
    answers = [await client.admit_one(account, **item) for _ in range(2)]
    assert [answer["outcome"] for answer in answers] == ["admitted", "admitted"]
    assert answers[0]["key_id"] == answers[1]["key_id"] != account.key_id
    assert await outcome(client, account, hashes=item["hashes"]) == "admitted"
    await client.assert_sound()


async def test_an_older_key_is_moved_once_by_many_first_uses_in_any_order(client: Client) -> None:
    pairs = [await legacy(client) for _ in range(4)]
    items = [
        [request(account, **item) for account, item in order]
        for order in (pairs, pairs[::-1], pairs, pairs[::-1])
    ]
    answers = [
        answer
        for batch in await asyncio.gather(*(client.admit(*batch) for batch in items))
        for answer in batch
    ]
    assert {answer["outcome"] for answer in answers} == {"admitted"}
    assert len({answer["key_id"] for answer in answers}) == 4
    await client.assert_sound()


async def test_rotating_a_moved_key_ends_its_old_secret(client: Client) -> None:
    account, item = await legacy(client)
    moved = (await client.admit_one(account, **item))["key_id"]
    await client.value(
        "update public.api_keys_new set key_hash = $2 where id = $1", moved, hash_of(f"new {moved}")
    )
    assert await outcome(client, account, **item) == "INVALID_KEY"


async def test_an_inactive_older_key_stays_inactive(client: Client) -> None:
    account, item = await legacy(client, is_active=False)
    assert await outcome(client, account, **item) == "INACTIVE_KEY"


async def test_an_older_key_that_cannot_be_moved_fails_alone(client: Client) -> None:
    account, item = await legacy(client)
    answers = await client.admit(request(account, **{**item, "hashes": []}), request(account))
    assert [answer["outcome"] for answer in answers] == ["failed", "admitted"]


async def test_an_unknown_older_key_does_not_exist(client: Client) -> None:
    account = await client.register()
    assert await outcome(client, account, hashes=[hash_of("x")], legacy_hash=hash_of("y")) == "INVALID_KEY"


# Registration.


def order(**changes: Any) -> dict[str, Any]:
    name = f"new{uuid.uuid4().hex[:12]}"
    return {**registration(name, f"key of {name}"), **changes}


async def test_registration_makes_a_user_a_key_counters_and_signup_credits(client: Client) -> None:
    answer = await client.call("register_user", order(signup_nanos=300))
    assert (answer["outcome"], answer["credits_nanos"], answer["subscription_status"]) == (
        "registered",
        300,
        "trial",
    )
    rows = await client.rows(
        "select subject from public.rate_limit_usage where (subject, subject_id) in (('user', $1), "
        "('key', $2))",
        answer["user_id"],
        answer["key_id"],
    )
    assert len(rows) == 2
    await client.assert_sound()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (lambda first: {"email": first["email"].upper()}, "email_taken"),
        (lambda first: {"username": first["username"].upper()}, "username_taken"),
    ],
    ids=["email", "username"],
)
async def test_names_and_addresses_are_unique_whatever_their_case(
    client: Client, changes: Any, expected: str
) -> None:
    first = order()
    await client.call("register_user", first)
    assert (await client.call("register_user", order(**changes(first))))["outcome"] == expected


async def test_the_same_registration_many_times_at_once_makes_one_user(client: Client) -> None:
    first = order()
    answers = await asyncio.gather(
        *(client.call("register_user", {**first, "key": order()["key"]}) for _ in range(5))
    )
    assert sorted(answer["outcome"] for answer in answers)[:4] != ["registered"] * 4
    assert [answer["outcome"] for answer in answers].count("registered") == 1


async def test_an_address_registers_five_an_hour_however_many_ask_at_once(client: Client) -> None:
    subject = uuid.uuid4().hex
    answers = await asyncio.gather(
        *(client.call("register_user", order(address_subject=subject)) for _ in range(12))
    )
    assert [answer["outcome"] for answer in answers].count("registered") == 5
    assert {answer["outcome"] for answer in answers} == {"registered", "address_limit"}
    assert (await client.call("register_user", order(address_subject=uuid.uuid4().hex)))[
        "outcome"
    ] == "registered"


async def test_a_plan_replaces_the_one_before(client: Client) -> None:
    account = await client.register()
    plan = await client.value("select id from public.plans where slug = 'free'")
    assign = {"user_id": account.id, "plan_id": plan, "duration_months": 1, "actor": "admin"}
    answers = await asyncio.gather(*(client.call("assign_plan", assign) for _ in range(4)))
    assert {answer["outcome"] for answer in answers} == {"assigned"}
    assert (
        await client.value(
            "select count(*) from public.user_plans where user_id = $1 and is_active", account.id
        )
        == 1
    )
    assert (await client.call("assign_plan", {**assign, "plan_id": 2**40}))["outcome"] == "plan_not_found"
    assert (await client.call("assign_plan", {**assign, "user_id": 2**40}))["outcome"] == "not_found"


@pytest.mark.parametrize(("environment", "prefix"), [("test", None), ("test", "live"), ("live", "test")])
async def test_a_key_whose_row_and_prefix_disagree_about_the_sandbox_is_refused(
    client: Client, environment: str, prefix: str | None
) -> None:
    """The prefix chooses the upstream and the row the charge: a test row without a prefix would get real
    answers for nothing.
    """
    account = await client.register(environment=environment)
    assert (await client.admit_one(account, prefix_environment=prefix))["outcome"] == "INVALID_KEY"
