"""Runtime: the clients, queues and caches of one running instance. Clients, queues and caches, opened in
order and closed in reverse.

`Service` is what the app holds: it opens a `Runtime` as soon as the configuration and the database allow, and
says in one sentence why not until then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import structlog

import db
import db_security
from common.errors import DatabaseUnavailable, Misconfigured
from config import Settings
from db_rows.keys import GuessCount, WrongSecret
from gateway.billing.admission import Admission
from gateway.billing.group_commit import GroupCommit
from gateway.billing.hold import Answer
from gateway.billing.journal import Journal
from gateway.billing.refusals import error_for_refusal
from gateway.billing.settlement import Settlements
from gateway.pricing.catalog import Catalog
from gateway.runtime.local_secrets import Secrets
from gateway.upstream.client import Upstream, open_live, open_sandbox
from gateway.upstream.provider_endpoints import ProviderEndpoints
from gateway.webhooks.deliveries import BATCH, LEASE_SECONDS, Deliveries
from security import Credential, Keyring, Vault
from supabase_config import AsyncClient

log = structlog.get_logger("runtime")
SWEEP_ROUNDS = 30
SHUTDOWN_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 15.0
KEEP_SECONDS = 2.0
COUNT_SECONDS = 10.0


class Runtime:
    """The parts of an instance that serves."""

    def __init__(self, settings: Settings, client: AsyncClient, secrets: Secrets | None) -> None:
        self.settings = settings
        self.client = client
        self.mode = settings.mode or "sandbox"
        self.secrets = secrets
        hash_secrets = [s.get_secret_value() for s in settings.key_hash_secrets]
        encryption = [s.get_secret_value() for s in settings.encryption_keys]
        self.keyring = Keyring(hash_secrets or [secrets.key_hash_secret] if secrets else hash_secrets)
        self.vault = Vault(encryption or [secrets.encryption_key] if secrets else encryption)
        self.admin_key = _admin_key(settings, secrets)
        self.exchanges: set[asyncio.Task[Any]] = set()
        self.keep_alive_seconds = KEEP_ALIVE_SECONDS
        self.goes_live = False  # this start is the database's first in live mode
        self._user_count, self._counted_at, self._counting = 0, float("-inf"), asyncio.Lock()
        self._upstreams: dict[str, Upstream] = {}
        self._catalogs: dict[str, Catalog] = {}
        self._provider_endpoints: dict[str, ProviderEndpoints] = {}
        batched: Any = db  # GroupCommit does not know the types of its items yet
        self._notes = GroupCommit(lambda items: batched.note_generations(client, items))
        self.settlements = Settlements(
            lambda items: batched.settle_requests(client, items),
            upstream_for=self._upstream_for,
            open_key=self.vault.decrypt,
            journal=_journal(settings),
        )
        self.deliveries = Deliveries(
            lambda only: db.claim_deliveries(
                client, limit=BATCH, lease_seconds=LEASE_SECONDS, delivery_id=only
            ),
            lambda order: db.finish_delivery(client, order),
            decrypt=self.vault.decrypt,
        )
        self.admission = Admission(
            lambda items: batched.admit_requests(client, items),
            mode=self.mode,
            markup=settings.price_markup,
            hold_ttl_seconds=settings.hold_ttl_seconds,
            vault=self.vault,
            raise_holds=lambda items: batched.raise_holds(client, items),
            abandoned=self.settlements.release,
            resolve_expired=self.settlements.resolve_expired,
        )

    # Which upstream serves whom: test keys have the sandbox in every mode, everybody has it in sandbox mode.

    def _kind(self, mode: str, environment: str | None) -> str:
        return "test" if environment == "test" else mode

    def upstream(self, environment: str | None) -> Upstream:
        """The upstream for keys of this environment."""
        return self._open(self._kind(self.mode, environment))

    def catalog(self, environment: str | None) -> Catalog:
        """The model list that goes with that upstream."""
        kind = self._kind(self.mode, environment)
        if kind not in self._catalogs:
            upstream = self._open(kind)
            self._catalogs[kind] = Catalog(
                upstream.fetch_models, ttl_seconds=self.settings.model_cache_ttl_seconds
            )
        return self._catalogs[kind]

    def provider_endpoints(self, environment: str | None) -> ProviderEndpoints:
        """The providers of that upstream's models."""
        kind = self._kind(self.mode, environment)
        if kind not in self._provider_endpoints:
            fetch, ttl = self._open(kind).find_endpoints, self.settings.model_cache_ttl_seconds
            self._provider_endpoints[kind] = ProviderEndpoints(fetch, ttl_seconds=ttl)
        return self._provider_endpoints[kind]

    def _open(self, kind: str) -> Upstream:
        if kind not in self._upstreams:
            self._upstreams[kind] = (
                open_live(self.settings) if kind == "live" else open_sandbox(for_test_keys=kind == "test")
            )
        return self._upstreams[kind]

    def _upstream_for(self, mode: str, environment: str) -> Upstream | None:
        kind = self._kind(mode, environment)
        return None if kind == "live" and self.settings.openrouter_api_key is None else self._open(kind)

    # What requests need.

    async def verify(self, credential: Credential, *, request_id: str, verb: str, resource: str) -> Answer:
        """The key and its user, checked by the database."""
        return await self.admission.verify(credential, request_id=request_id, verb=verb, resource=resource)

    async def note_wrong_secret(self, attempt: WrongSecret) -> GuessCount:
        """Audits a wrong administrator's key or sweep secret, and says whether its address has tried too
        many.
        """
        return await db_security.note_wrong_secret(self.client, attempt)

    async def check(self) -> None:
        """Raises what keeps it from serving now: DatabaseUnavailable, or Misconfigured where another instance
        took the database live.
        """
        if await db.get_mode(self.client) != self.mode:
            raise error_for_refusal({"outcome": "wrong_mode"}, "")

    async def count_users(self) -> int:
        """How many accounts there are, at most ten seconds ago: a health check must not count a large table
        each time.
        """
        async with self._counting:
            if time.monotonic() - self._counted_at >= COUNT_SECONDS:
                self._user_count = await db.count_users(self.client)
                self._counted_at = time.monotonic()
        return self._user_count

    def pseudonym(self, user_id: int, text: str) -> str:
        """A stable name for what belongs to one tenant, which says nothing about it to the upstream."""
        return self.keyring.pseudonym(f"{user_id}\0{text}")

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Runs a request's work in a task that outlives its client; `aclose` waits for it."""
        task = asyncio.create_task(work, name=name)
        self.exchanges.add(task)
        task.add_done_callback(self.exchanges.discard)
        return task

    def note_generation(self, request_id: str, generation_id: str) -> None:
        """Stores the generation id of a request that is still running."""
        self.settlements.spawn(
            self._note({"request_id": request_id, "generation_id": generation_id}), f"note for {request_id}"
        )

    async def keep_generation(self, request_id: str, generation_id: str) -> None:
        """The same, done when it returns or given up after two seconds: on a serverless platform nothing may
        run after the answer.
        """
        try:
            async with asyncio.timeout(KEEP_SECONDS):
                await self._note({"request_id": request_id, "generation_id": generation_id})
        except TimeoutError:
            log.warning(
                "generation_not_noted", request_id=request_id, reason="the database did not answer in time"
            )

    async def _note(self, item: dict[str, Any]) -> None:
        try:
            await self._notes.submit(item, group=item["request_id"])
        except DatabaseUnavailable as error:
            log.warning("generation_not_noted", request_id=item["request_id"], reason=error.message)

    @property
    def journal_folder(self) -> Path:
        """Where this instance keeps settlements that the database has not taken yet."""
        return _journal_folder(self.settings)

    async def sweep(self) -> dict[str, int]:
        """Finishes what crashed instances left behind, sends what webhooks are waiting for, and forgets
        answers whose time is over.
        """
        found = await self.settlements.sweep(
            lambda limit, skip: db.list_expired_holds(self.client, limit, skip)
        )
        await self.deliveries.deliver_due()
        for _ in range(SWEEP_ROUNDS):
            if not await db.delete_expired_answers(self.client):
                break
        return found

    async def sum_up(self) -> None:
        """Brings the usage sums up to what is closed, a day at a time."""
        while await db.sum_up_usage(self.client):
            pass
        await db.note_open_items(self.client)

    async def aclose(self) -> None:
        """Lets running requests end for a while, settles the others, and closes the upstreams."""
        if self.exchanges:
            _, late = await asyncio.wait(self.exchanges, timeout=SHUTDOWN_SECONDS)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        await self.admission.drain()
        await self.settlements.drain(SHUTDOWN_SECONDS)
        for catalog in self._catalogs.values():
            await catalog.aclose()
        for lists in self._provider_endpoints.values():
            await lists.aclose()
        for upstream in self._upstreams.values():
            await upstream.aclose()


def _admin_key(settings: Settings, secrets: Secrets | None) -> str:
    if settings.admin_api_key is not None:
        return settings.admin_api_key.get_secret_value()
    if secrets is None:
        raise Misconfigured("ADMIN_API_KEY is missing.")
    return secrets.admin_api_key


def _journal(settings: Settings) -> Journal | None:
    return None if settings.vercel else Journal(_journal_folder(settings))


def _journal_folder(settings: Settings) -> Path:
    return settings.gateway_data_dir / "settlements"
