"""The parts of one running instance: clients, queues and caches, opened in order and closed in reverse.

`Service` (gateway/runtime/service.py) opens a `Runtime` as soon as the configuration and the database allow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path

from pydantic import SecretStr

import db
from common.errors import Misconfigured
from config import Settings
from db_rows.requests import Verified
from db_rows.shared import Mode
from gateway.billing.admission import Admission
from gateway.billing.journal import Journal
from gateway.billing.refusals import wrong_mode
from gateway.billing.settlement import Settlements
from gateway.pricing.catalog import Catalog
from gateway.runtime.local_secrets import Secrets
from gateway.runtime.upstreams import Upstreams
from gateway.upstream.client import Upstream
from gateway.upstream.provider_endpoints import ProviderEndpoints
from gateway.webhooks.deliveries import BATCH, LEASE_SECONDS, Deliveries
from security import Credential, Keyring, Vault
from supabase_config import AsyncClient

SHUTDOWN_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 15.0


class Runtime:
    """The parts of an instance that serves. Making it needs a running event loop."""

    def __init__(self, settings: Settings, client: AsyncClient, secrets: Secrets | None) -> None:
        self.settings = settings
        self.client = client
        self.mode: Mode = settings.mode or "sandbox"
        self.secrets = secrets
        self.admin_key = _admin_key(settings, secrets)
        self.keyring = Keyring(_texts(settings.key_hash_secrets) or _local(secrets, "key_hash_secret"))
        self.vault = Vault(_texts(settings.encryption_keys) or _local(secrets, "encryption_key"))
        self.keep_alive_seconds = KEEP_ALIVE_SECONDS
        self.goes_live = False  # whether this start is the database's first in live mode
        self.exchanges: set[asyncio.Task[None]] = set()
        self._upstreams = Upstreams(settings, self.mode)
        self.settlements = self._make_settlements()
        self.deliveries = self._make_deliveries()
        self.admission = self._make_admission()

    def _make_settlements(self) -> Settlements:
        client, settings = self.client, self.settings
        return Settlements(
            lambda items: db.settle_requests(client, items),
            note_generations=lambda notes: db.note_generations(client, notes),
            upstream_for=self._upstreams.upstream_of_record,
            decrypt=self.vault.decrypt,
            # On a serverless platform there is no disk that another process would find.
            journal=None if settings.vercel else Journal(self.journal_folder),
        )

    def _make_deliveries(self) -> Deliveries:
        client = self.client
        return Deliveries(
            lambda only: db.claim_deliveries(
                client, limit=BATCH, lease_seconds=LEASE_SECONDS, delivery_id=only
            ),
            lambda result: db.finish_delivery(client, result),
            decrypt=self.vault.decrypt,
        )

    def _make_admission(self) -> Admission:
        client, settings = self.client, self.settings
        return Admission(
            lambda items: db.admit_requests(client, items),
            mode=self.mode,
            markup=settings.price_markup,
            hold_ttl_seconds=settings.hold_ttl_seconds,
            vault=self.vault,
            raise_holds=lambda items: db.raise_holds(client, items),
            abandoned=self.settlements.release,
            resolve_expired=self.settlements.resolve_expired,
        )

    # Which upstream serves whom.

    def upstream(self, environment: str | None) -> Upstream:
        """The upstream for keys of this environment."""
        return self._upstreams.upstream(environment)

    def catalog(self, environment: str | None) -> Catalog:
        """The model list of that upstream."""
        return self._upstreams.catalog(environment)

    def provider_endpoints(self, environment: str | None) -> ProviderEndpoints:
        """The lists of the providers that serve that upstream's models."""
        return self._upstreams.provider_endpoints(environment)

    # What requests need.

    async def verify(self, credential: Credential, *, request_id: str, verb: str, resource: str) -> Verified:
        """The verified key and its user. Raises InvalidKey, Forbidden, DatabaseUnavailable."""
        return await self.admission.verify(credential, request_id=request_id, verb=verb, resource=resource)

    async def check(self) -> None:
        """Raises what keeps it from serving now: DatabaseUnavailable, or Misconfigured where another instance
        took the database live.
        """
        if await db.get_mode(self.client) != self.mode:
            raise wrong_mode()

    def start(self, work: Coroutine[object, None, None], name: str) -> asyncio.Task[None]:
        """Runs a request's work in a task that outlives its client; `aclose` waits for it."""
        task = asyncio.create_task(work, name=name)
        self.exchanges.add(task)
        task.add_done_callback(self.exchanges.discard)
        return task

    @property
    def journal_folder(self) -> Path:
        """Where this instance keeps settlements that the database has not taken yet."""
        return self.settings.gateway_data_dir / "settlements"

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
        await self._upstreams.aclose()


def _texts(secrets: Sequence[SecretStr]) -> list[str]:
    return [secret.get_secret_value() for secret in secrets]


def _local(secrets: Secrets | None, name: str) -> list[str]:
    """The secret of a bare machine, where no setting names one."""
    return [] if secrets is None else [getattr(secrets, name)]


def _admin_key(settings: Settings, secrets: Secrets | None) -> str:
    if settings.admin_api_key is not None:
        return settings.admin_api_key.get_secret_value()
    if secrets is None:
        raise Misconfigured("ADMIN_API_KEY is missing.")
    return secrets.admin_api_key
