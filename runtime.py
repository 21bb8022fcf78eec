"""What does a running instance consist of? Clients, queues and caches, opened in order and closed in reverse.

`Service` is what the app holds: it opens a `Runtime` as soon as the configuration and the database allow, and says in one sentence why
not until then.
"""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import structlog

import db
import db_security
import db_spending
from admission import Admission, Answer
from batching import Queue
from catalog import Catalog
from config import Configuration, Settings
from endpoint_lists import EndpointLists
from errors import DatabaseUnavailable, GatewayError, Misconfigured, UpstreamUnavailable
from first_start import Secrets, keep_secrets
from metering import Exchange
from openrouter import Upstream, open_live, open_sandbox
from refusals import refusal_error
from security import Credential, Keyring, Vault
from settlements import Journal, Settlements
from supabase_config import SCHEMA_VERSION, AsyncClient, open_database
from webhooks import BATCH, LEASE_SECONDS, Deliveries

log = structlog.get_logger("runtime")

RETRY_START_SECONDS = 1.0
SWEEP_SECONDS = 60.0
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
        self._endpoint_lists: dict[str, EndpointLists] = {}
        self._notes = Queue(lambda items: db.note_generations(client, items))
        self.settlements = Settlements(
            lambda items: db.settle_requests(client, items),
            upstream_for=self._upstream_for,
            open_key=self.vault.decrypt,
            journal=_journal(settings),
        )
        self.deliveries = Deliveries(
            lambda only: db_spending.claim_deliveries(client, limit=BATCH, lease_seconds=LEASE_SECONDS, delivery_id=only),
            lambda order: db_spending.finish_delivery(client, order),
            decrypt=self.vault.decrypt,
        )
        self.admission = Admission(
            lambda items: db.admit_requests(client, items),
            mode=self.mode,
            markup=settings.price_markup,
            hold_ttl_seconds=settings.hold_ttl_seconds,
            vault=self.vault,
            raise_holds=lambda items: db.raise_holds(client, items),
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
            self._catalogs[kind] = Catalog(upstream.fetch_models, ttl_seconds=self.settings.model_cache_ttl_seconds)
        return self._catalogs[kind]

    def endpoint_lists(self, environment: str | None) -> EndpointLists:
        """The providers of that upstream's models."""
        kind = self._kind(self.mode, environment)
        if kind not in self._endpoint_lists:
            fetch, ttl = self._open(kind).find_endpoints, self.settings.model_cache_ttl_seconds
            self._endpoint_lists[kind] = EndpointLists(fetch, ttl_seconds=ttl)
        return self._endpoint_lists[kind]

    def _open(self, kind: str) -> Upstream:
        if kind not in self._upstreams:
            self._upstreams[kind] = open_live(self.settings) if kind == "live" else open_sandbox(for_test_keys=kind == "test")
        return self._upstreams[kind]

    def _upstream_for(self, mode: str, environment: str) -> Upstream | None:
        kind = self._kind(mode, environment)
        return None if kind == "live" and self.settings.openrouter_api_key is None else self._open(kind)

    # What requests need.

    async def verify(self, credential: Credential, *, request_id: str, verb: str, resource: str) -> Answer:
        """The key and its user, checked by the database."""
        return await self.admission.verify(credential, request_id=request_id, verb=verb, resource=resource)

    async def note_wrong_secret(self, attempt: dict[str, Any]) -> dict[str, Any]:
        """Audits a wrong administrator's key or sweep secret, and says whether its address has tried too many."""
        return await db_security.note_wrong_secret(self.client, attempt)

    async def check(self) -> None:
        """Raises what keeps it from serving now: DatabaseUnavailable, or Misconfigured where another instance took the database live."""
        if await db.get_mode(self.client) != self.mode:
            raise refusal_error({"outcome": "wrong_mode"}, "")

    async def count_users(self) -> int:
        """How many accounts there are, at most ten seconds ago: a health check must not count a large table each time."""
        async with self._counting:
            if time.monotonic() - self._counted_at >= COUNT_SECONDS:
                self._user_count = await db.count_users(self.client)
                self._counted_at = time.monotonic()
        return self._user_count

    def pseudonym(self, user_id: int, text: str) -> str:
        """A stable name for what belongs to one tenant, which says nothing about it to the upstream."""
        return self.keyring.pseudonym(f"{user_id}\0{text}")

    def start(self, exchange: Exchange) -> asyncio.Task[None]:
        """Runs an exchange in a task that outlives its client."""
        task = asyncio.create_task(exchange.run(), name=f"request {exchange.request.request_id}")
        self.exchanges.add(task)
        task.add_done_callback(self.exchanges.discard)
        return task

    def note_generation(self, request_id: str, generation_id: str) -> None:
        """Stores the generation id of a request that is still running."""
        self.settlements.spawn(self._note({"request_id": request_id, "generation_id": generation_id}), f"note for {request_id}")

    async def keep_generation(self, request_id: str, generation_id: str) -> None:
        """The same, done when it returns or given up after two seconds: on a serverless platform nothing may run after the answer."""
        try:
            async with asyncio.timeout(KEEP_SECONDS):
                await self._note({"request_id": request_id, "generation_id": generation_id})
        except TimeoutError:
            log.warning("generation_not_noted", request_id=request_id, reason="the database did not answer in time")

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
        """Finishes what crashed instances left behind, sends what webhooks are waiting for, and forgets answers whose time is over."""
        found = await self.settlements.sweep(lambda limit, skip: db.list_expired_holds(self.client, limit, skip))
        await self.deliveries.deliver_due()
        for _ in range(SWEEP_ROUNDS):
            if not await db.delete_expired_answers(self.client):
                break
        return found

    async def sum_up(self) -> None:
        """Brings the usage sums up to what is closed, a day at a time."""
        while await db.sum_up_usage(self.client):
            pass
        await db_spending.note_open_items(self.client)

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
        for lists in self._endpoint_lists.values():
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


async def _check_database(runtime: Runtime) -> None:
    """Refuses a database that is older than the code, of another mode, or with keys that our secrets cannot recognise."""
    settings = runtime.settings
    version = await db.get_schema_version(runtime.client)
    if version < SCHEMA_VERSION:
        command = "supabase db push" if settings.database == "hosted" else "make migrate"
        raise Misconfigured(f"The database's schema is at version {version}, this code needs {SCHEMA_VERSION}. Run: {command}")
    missing = await db_security.list_key_secrets_in_use(runtime.client) - set(runtime.keyring.ids)
    if missing:
        raise Misconfigured("KEY_HASH_SECRETS lacks a secret that stored API keys still need: put the old one back, after the new one.")
    runtime.goes_live = runtime.mode == "live" and await db.get_mode(runtime.client) != "live"
    if runtime.goes_live:
        await _check_upstream_key(runtime)
    # Last, as there is no way back.
    mode = await db.enter_mode(runtime.client, runtime.mode)
    if mode["outcome"] == "refused":
        raise Misconfigured(
            "This database has been live and refuses sandbox mode: it would answer paying users with invented text. "
            "Set OPENROUTER_API_KEY, or, for a sandbox beside it, another database (GATEWAY_DATA_DIR or DATABASE_URL)."
        )


async def _check_upstream_key(runtime: Runtime) -> None:
    """Refuses to go live with a key that the upstream refuses: it would end all play credits, for nothing."""
    try:
        account = await runtime.upstream(None).read_account()
    except UpstreamUnavailable:
        return
    if account is None:
        raise Misconfigured("OpenRouter refuses OPENROUTER_API_KEY. The database stays in sandbox mode until it takes the key.")


class Service:
    """The instance as the app sees it, whether it can serve or not."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.runtime: Runtime | None = None
        self.problem: GatewayError | None = None
        # Where it is served, if that is known: by `make run`, not under a server that somebody else started.
        self.url: str | None = None
        self._stack = AsyncExitStack()
        self._starting = asyncio.Lock()
        self._tried_at = float("-inf")
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def settings(self) -> Settings:
        return self.configuration.settings

    async def start(self) -> None:
        """Opens the runtime if that is possible now; if not, `problem` says why and requests try again."""
        async with self._starting:
            await self._try()
            self._tried_at = time.monotonic()

    async def ready(self) -> Runtime:
        """The runtime. Raises Misconfigured or DatabaseUnavailable while there is none; tries once a second at most to open it."""
        if self.runtime is not None:
            return self.runtime
        async with self._starting:
            if self.runtime is None and time.monotonic() - self._tried_at >= RETRY_START_SECONDS:
                await self._try()
                self._tried_at = time.monotonic()
        if self.runtime is None:
            raise self.problem or Misconfigured()
        return self.runtime

    async def _try(self) -> None:
        if self.configuration.problems:
            self.problem = Misconfigured("\n".join(self.configuration.problems))
            return
        stack = AsyncExitStack()
        try:
            client = await stack.enter_async_context(open_database(self.settings))
            runtime = Runtime(self.settings, client, self._secrets())
            await _check_database(runtime)
        except GatewayError as found:
            problem = _for_operator(found, self.settings)
            if problem.message != (self.problem.message if self.problem else None):
                log.error("cannot_serve", reason=problem.message)
            self.problem = problem
            await stack.aclose()
            return
        self.problem, self._stack, self.runtime = None, stack, runtime
        runtime.settlements.replay_journal()
        if not self.settings.vercel:
            self._sweeper = asyncio.create_task(self._sweep_for_ever(runtime), name="sweep")
        tune_garbage_collection()

    def _secrets(self) -> Secrets | None:
        if self.settings.database != "embedded":
            return None
        try:
            return keep_secrets(self.settings.gateway_data_dir)
        except (ValueError, KeyError) as error:
            raise Misconfigured(f"secrets.json in {self.settings.gateway_data_dir} is damaged: restore it from a backup.") from error
        except OSError as error:
            raise Misconfigured(f"The data folder {self.settings.gateway_data_dir} cannot be used: {error.strerror}.") from error

    async def _sweep_for_ever(self, runtime: Runtime) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await runtime.sweep()
                await runtime.sum_up()
            except Exception as error:
                log.error("sweep_failed", exc_info=error)

    async def aclose(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait([self._sweeper])
        if self.runtime is not None:
            await self.runtime.aclose()
        await self._stack.aclose()
        self.runtime = None


def _for_operator(problem: GatewayError, settings: Settings) -> GatewayError:
    """What a database that does not answer at the start means to whoever set it up; the reason may hold names and goes to the log."""
    if not isinstance(problem, DatabaseUnavailable):
        return problem
    cause = problem.__cause__
    log.error("database_unreachable", reason=str(getattr(cause, "message", None) or cause))
    advice = {
        "hosted": "Check SUPABASE_URL and SUPABASE_KEY.",
        "url": "Check DATABASE_URL; a database that is new needs: make migrate.",
        "embedded": "The log in GATEWAY_DATA_DIR may say why.",
    }
    return DatabaseUnavailable(f"The gateway's database cannot be used yet. {advice[settings.database]} The gateway's log has the reason.")


def tune_garbage_collection() -> None:
    """Everything made at start-up stays: collections need not look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 20)
