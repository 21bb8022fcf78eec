"""Cached lists of a model's provider endpoints, each fetched by one request at a time.

They must only ever be asked for models of the catalog: otherwise strangers would choose what we fetch. A
bounded number of lists is held.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import orjson
from cachetools import TLRUCache

from common.errors import GatewayError, UpstreamUnavailable

MOST_LISTS = 512
FETCHES_AT_ONCE = 4
MAX_BYTES = 1024 * 1024
RETRY_SECONDS = 10.0  # a failure is not asked about again before
UNREADABLE = "The list of this model's endpoints cannot be had from the upstream now. Try again."


@dataclass(frozen=True, slots=True)
class _Lookup:
    """What the upstream wrote, held for so many seconds; None where it knows no such model, or did not answer
    (`failed`).
    """

    body: bytes | None
    seconds: float
    failed: bool = False


def _expiry(_model_id: str, lookup: _Lookup, now: float) -> float:
    return now + lookup.seconds


class ProviderEndpoints:
    """The lists of the models that were asked for last.

    `fetch` returns the body of GET /models/{id}/endpoints. A list is held for `ttl_seconds`, a failure for
    RETRY_SECONDS (or `ttl_seconds`, if shorter).
    """

    def __init__(
        self,
        fetch: Callable[[str], Awaitable[bytes | None]],
        *,
        ttl_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._ttl = ttl_seconds
        self._lookups = TLRUCache[str, _Lookup, float](MOST_LISTS, _expiry, clock)
        self._fetching: dict[str, asyncio.Task[bytes | None]] = {}
        # A client that asks for one model after the other must not make us flood the upstream.
        self._gate = asyncio.Semaphore(FETCHES_AT_ONCE)

    def __len__(self) -> int:
        return len(self._lookups)

    async def get(self, model_id: str) -> bytes | None:
        """The list as JSON, None for a model that the upstream does not know. Raises UpstreamUnavailable."""
        lookup = self._lookups.get(model_id)
        if lookup is None:
            # A caller that goes away must not take the list from the others who wait for it.
            return await asyncio.shield(self._fetching.get(model_id) or self._start(model_id))
        if lookup.failed:
            raise UpstreamUnavailable(UNREADABLE)
        return lookup.body

    async def aclose(self) -> None:
        """Stops what is being fetched."""
        running = list(self._fetching.values())
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    def _start(self, model_id: str) -> asyncio.Task[bytes | None]:
        task = asyncio.create_task(self._load(model_id), name=f"endpoints of {model_id}")
        task.add_done_callback(lambda done: self._store(model_id, done))
        self._fetching[model_id] = task
        return task

    async def _load(self, model_id: str) -> bytes | None:
        async with self._gate:
            raw = await self._fetch(model_id)
        if raw is not None and not _is_list(raw):
            raise UpstreamUnavailable(UNREADABLE)
        return raw

    def _store(self, model_id: str, task: asyncio.Task[bytes | None]) -> None:
        del self._fetching[model_id]
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._lookups[model_id] = _Lookup(task.result(), self._ttl)
        elif isinstance(error, GatewayError):  # any other is a bug of ours, which those who wait for it see
            self._lookups[model_id] = _Lookup(None, min(self._ttl, RETRY_SECONDS), failed=True)


def _is_list(raw: bytes) -> bool:
    try:
        answer = orjson.loads(raw) if len(raw) <= MAX_BYTES else None
    except orjson.JSONDecodeError:
        return False
    return isinstance(answer, dict) and isinstance(answer.get("data"), dict)
