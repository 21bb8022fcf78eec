"""The instance as the app holds it, whether it can serve or not: starts when it can, says why it cannot,
shuts down.
"""

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
from gateway.runtime.maintenance import maintain_for_ever
from gateway.runtime.startup_checks import check_database, for_operator
from supabase_config import open_database

log = structlog.get_logger("runtime")

RETRY_START_SECONDS = 1.0


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
        self._maintenance: asyncio.Task[None] | None = None

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
            stack.push_async_callback(runtime.aclose)
            await check_database(runtime)
        except GatewayError as error:
            self._note_problem(for_operator(error, self.settings))
            await stack.aclose()
            return
        except BaseException:  # a cancelled start must not leave a database server behind
            await stack.aclose()
            raise
        self.problem, self._stack, self.runtime = None, stack, runtime
        runtime.settlements.replay_journal()
        if not self.settings.vercel:
            self._maintenance = asyncio.create_task(maintain_for_ever(runtime), name="maintenance")
        tune_garbage_collection()

    def _note_problem(self, problem: GatewayError) -> None:
        # Requests try again every second: the same problem is logged once.
        if self.problem is None or problem.message != self.problem.message:
            log.error("cannot_serve", reason=problem.message)
        self.problem = problem

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

    async def aclose(self) -> None:
        if self._maintenance is not None:
            self._maintenance.cancel()
            await asyncio.wait([self._maintenance])
        await self._stack.aclose()
        self.runtime = None


def tune_garbage_collection() -> None:
    """Exempts what start-up made from collections: it stays, and looking through it costs a fifth of the
    speed.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 20)
