"""One client of the SQL functions, with the rights that the gateway has: `service_role`, through
`authenticator`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from tests.support.database import UNLIMITED, Connection, Database

Json = dict[str, Any]
SECONDS_TO_ASK_AGAIN = 10.0  # five times as long as the gateway's queue
RINGS = {
    "burst_ring": (11, 100),
    "minute_ring": (7, 10_000),
    "hour_ring": (13, 300_000),
    "day_ring": (25, 3_600_000),
}


def new_id() -> str:
    """A UUIDv7, as the gateway makes them."""
    return str(
        uuid.UUID(
            int=(time.time_ns() // 1_000_000 << 80) | 7 << 76 | 2 << 62 | int.from_bytes(os.urandom(7), "big")
        )
    )


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True)
class Account:
    """A user and one key of theirs; `hash` is what stands in for the key."""

    id: int
    key_id: int
    hash: str
    environment: str = "live"


_numbers = itertools.count()


@dataclass
class Client:
    """Calls the functions of one database as an instance of the gateway does. `owner` is past every grant."""

    database: Database
    owner: Connection
    stack: AsyncExitStack
    gate: asyncio.Semaphore
    idle: list[Connection] = field(default_factory=list)

    async def call(self, function: str, *arguments: Any) -> Any:
        """One function's JSON answer."""
        marks = ", ".join(f"${n}" for n in range(1, len(arguments) + 1))
        return await self.ask(f"select public.{function}({marks})", *arguments)

    async def ask(self, query: str, *arguments: Any) -> Any:
        """One value, with the gateway's rights."""
        async with self.gate:
            connection = self.idle.pop() if self.idle else await self.connect()
            try:
                answer = await connection.fetchval(query, *(_plain(a) for a in arguments))
            finally:
                self.idle.append(connection)
        return (
            json.loads(answer, parse_float=Decimal)
            if isinstance(answer, str) and answer[:1] in ("{", "[")
            else answer
        )

    async def connect(self) -> Connection:
        """One more session, for as long as the client lives."""
        return await self.stack.enter_async_context(self.database.connection("service_role"))

    async def rows(self, query: str, *arguments: Any) -> list[Json]:
        return [dict(row) for row in await self.owner.fetch(query, *arguments)]

    async def value(self, query: str, *arguments: Any) -> Any:
        return await self.owner.fetchval(query, *arguments)

    async def register(
        self, *, credits_nanos: int = 0, environment: str = "live", limits: Json | None = None
    ) -> Account:
        """A user with these credits, granted by an admin, without rate limits unless some are given."""
        number = next(_numbers)
        key = f"key {number}"
        item = registration(f"user{number}", key, environment=environment)
        answer = await self.call("register_user", item)
        assert answer["outcome"] == "registered", answer
        account = Account(answer["user_id"], answer["key_id"], hash_of(key), environment)
        await self.call(
            "set_rate_limits",
            {
                "user_id": account.id,
                "subject": "user",
                "limits": {**UNLIMITED, **(limits or {})},
                "actor": "admin",
            },
        )
        await self.value("update public.users set is_funded = true where id = $1", account.id)
        if credits_nanos:
            await self.grant(account, credits_nanos)
        return account

    async def grant(self, account: Account, amount_nanos: int, **rest: Any) -> Json:
        return dict(
            await self.call(
                "grant_credits",
                {"user_id": account.id, "amount_nanos": amount_nanos, "actor": "admin", **rest},
            )
        )

    async def call_batch(self, function: str, items: Sequence[Json]) -> list[Json]:
        """The answers to a batch, in its order; a busy item is asked again, as the gateway's queue does.

        On a loaded machine, a user's lock may be held for longer than a call waits for it. Tests of "busy"
        itself use `call`, which asks once.
        """
        answers: list[Json] = list(await self.call(function, items))
        deadline = time.monotonic() + SECONDS_TO_ASK_AGAIN
        while time.monotonic() < deadline:
            busy = [number for number, answer in enumerate(answers) if answer["outcome"] == "busy"]
            if not busy:
                break
            await asyncio.sleep(0.01)
            again = await self.call(function, [items[number] for number in busy])
            for number, answer in zip(busy, again, strict=True):
                answers[number] = answer
        return answers

    async def admit(self, *items: Json) -> list[Json]:
        return await self.call_batch("admit_requests", items)

    async def admit_one(self, account: Account, **changes: Any) -> Json:
        return (await self.admit(request(account, **changes)))[0]

    async def settle(self, *items: Json) -> list[Json]:
        return await self.call_batch("settle_requests", items)

    async def settle_one(self, request_id: str, **changes: Any) -> Json:
        return (await self.settle(settlement(request_id, **changes)))[0]

    async def user(self, account: Account) -> Json:
        return (await self.rows("select * from public.users where id = $1", account.id))[0]

    async def record(self, request_id: str) -> Json:
        return (
            await self.rows("select * from public.usage_records where request_id = $1", uuid.UUID(request_id))
        )[0]

    async def counters(self, account: Account, subject: str = "user") -> Json:
        number = account.id if subject == "user" else account.key_id
        query = "select * from public.rate_limit_usage where subject = $1 and subject_id = $2"
        return (await self.rows(query, subject, number))[0]

    async def change_key(self, account: Account, **columns: Any) -> None:
        """Sets columns of a key as an administrator's console would."""
        names = ", ".join(f"{name} = ${n}" for n, name in enumerate(columns, 2))
        await self.value(
            f"update public.api_keys_new set {names} where id = $1", account.key_id, *columns.values()
        )

    async def change_user(self, account: Account, **columns: Any) -> None:
        names = ", ".join(f"{name} = ${n}" for n, name in enumerate(columns, 2))
        await self.value(f"update public.users set {names} where id = $1", account.id, *columns.values())

    async def assert_sound(self) -> None:
        """The books balance, and every counter says what the journal says."""
        assert await self.rows("select * from public.audit_ledger()") == []
        assert await self.rows(DRIFTED) == []
        assert await self.rows(DRIFTED_END_USERS) == []


# Slots and held budgets that are not what the journal's pending records add up to.
DRIFTED = """
select u.* from public.rate_limit_usage u, lateral (
    select count(*) as slots, count(*) filter (where r.environment = 'test') as test_slots,
    coalesce(sum(r.hold_nanos), 0) as held,
           min(r.created_at) as oldest
    from public.usage_records r where r.status = 'pending' and
    case u.subject when 'user' then r.user_id else r.key_id end = u.subject_id
) as p where u.subject <> 'address' and (
    u.slots <> p.slots or (u.subject = 'key' and u.budget_held_nanos <> p.held)
    or (u.subject = 'user' and (u.test_slots <> p.test_slots or u.pending_since > p.oldest)))
"""

DRIFTED_END_USERS = """
select u.*, p.held from public.end_user_usage u, lateral (
    select coalesce(sum(r.hold_nanos), 0) as held from public.usage_records r
    where r.status = 'pending' and r.user_id = u.user_id and r.end_user = u.end_user and r.has_end_user_budget
) as p where u.budget_held_nanos <> p.held
"""


def _plain(argument: Any) -> Any:
    return json.dumps(argument) if isinstance(argument, dict | list | tuple) else argument


def registration(username: str, key: str, *, environment: str = "live", **changes: Any) -> Json:
    """An order for register_user."""
    stored = {
        "key_name": "primary",
        "key_prefix": "gw_live_",
        "last4": key[-4:].rjust(4, "0"),
        "key_hash": hash_of(key),
        "hash_secret_id": "secret-1",
        "environment_tag": environment,
        "scope_permissions": {"read": ["*"], "write": ["*"]},
    }
    return {
        "username": username,
        "email": f"{username}@example.com",
        "auth_method": "email",
        "key": stored,
        "signup_nanos": 0,
        "trial_days": 3,
        "address": "192.0.2.1",
        **changes,
    }


def request(account: Account, **changes: Any) -> Json:
    """An item for admit_requests: at most 100 output tokens at 10 nanos, on top of 100 nanos that are
    certain.
    """
    return {
        "request_id": new_id(),
        "hashes": [account.hash],
        "secret_id": "secret-1",
        "prefix_environment": "test" if account.environment == "test" else None,
        "verb": "write",
        "resource": "chat",
        "address": "192.0.2.7",
        "mode": "sandbox",
        "holds": True,
        "resent": False,
        "endpoint": "chat/completions",
        "streamed": False,
        "models": ["openai/gpt-4o-mini"],
        "prompt_estimate": 10,
        "fixed_nanos": "100",
        "output_nanos": "10",
        "min_output": 1,
        "max_output": 100,
        "markup": "1",
        "ttl_seconds": 600,
        "byok": True,
        **changes,
    }


def settlement(request_id: Any, /, **changes: Any) -> Json:
    """An item for settle_requests: completed, at 500 nanos."""
    return {
        "request_id": request_id,
        "status": "completed",
        "source": "usage",
        "billable_nanos": "500",
        "prompt_tokens": 10,
        "completion_tokens": 20,
        **changes,
    }


@asynccontextmanager
async def open_client(database: Database, connections: int = 3) -> AsyncIterator[Client]:
    async with AsyncExitStack() as stack:
        owner = await stack.enter_async_context(database.connection("postgres"))
        yield Client(database, owner, stack, asyncio.Semaphore(connections))


@asynccontextmanager
async def locked_user(client: Client, account: Account) -> AsyncIterator[Connection]:
    """Another transaction that holds this user's lock until the block ends, or until it says so."""
    async with client.database.connection("postgres") as other:
        await other.execute("begin")
        await other.execute("select from public.users where id = $1 for no key update", account.id)
        yield other


async def until_blocked(client: Client, sessions: int = 1) -> None:
    """Returns once this many sessions wait for a lock."""
    query = (
        "select count(*) from pg_stat_activity where datname = current_database() "
        "and wait_event_type = 'Lock'"
    )
    async with asyncio.timeout(10):
        while await client.value(query) < sessions:  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # there is no event to wait for: another server process blocks


# One usage record, as settlement would leave it.
INSERT_RECORD = """
insert into public.usage_records (
    request_id, user_id, key_id, mode, environment, endpoint, model, provider, prompt_tokens,
    completion_tokens, hold_nanos,
    upstream_cost_nanos, cost_nanos, markup, status, settlement_source, error_code, latency_ms, created_at,
    expires_at, settled_at)
values ($1, $2, $3, 'sandbox', 'live', 'chat/completions', $4, $5, $6, $7, 0, $8, $8, 1, $9, $10, $11, $12,
$13,
        $13::timestamptz + interval '15 minutes', $13)
"""
