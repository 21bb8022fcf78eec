"""Service: starts the runtime when it can, retries, sweeps, shuts down."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import AsyncExitStack

import structlog

from common.errors import GatewayError, Misconfigured
from config import Configuration, Settings
from gateway.runtime.instance import Runtime
from gateway.runtime.local_secrets import Secrets, keep_secrets
from gateway.runtime.startup_checks import check_database, for_operator
from supabase_config import open_database

log = structlog.get_logger("runtime")

RETRY_START_SECONDS = 1.0
SWEEP_SECONDS = 60.0


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
        """The runtime. Raises Misconfigured or DatabaseUnavailable while there is none; tries once a second
        at most to open it.
        """
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
            await check_database(runtime)
        except GatewayError as found:
            problem = for_operator(found, self.settings)
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
            raise Misconfigured(
                f"secrets.json in {self.settings.gateway_data_dir} is damaged: restore it from a backup."
            ) from error
        except OSError as error:
            raise Misconfigured(
                f"The data folder {self.settings.gateway_data_dir} cannot be used: {error.strerror}."
            ) from error

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


def tune_garbage_collection() -> None:
    """Everything made at start-up stays: collections need not look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 20)
