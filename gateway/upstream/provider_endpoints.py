"""Cached lists of a model's provider endpoints. The upstream's lists, kept in memory for a while and fetched
by one at a time.

Only ever asked for models of the catalog: strangers must not choose what we fetch. It holds a bounded number
of lists.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import orjson

from common.errors import GatewayError, UpstreamUnavailable

MOST_LISTS = 512
FETCHES_AT_ONCE = 4
MAX_BYTES = 1024 * 1024
RETRY_SECONDS = 10.0
UNREADABLE = "The list of this model's endpoints cannot be had from the upstream now. Try again."


@dataclass(frozen=True, slots=True)
class _Kept:
    """A list as the upstream wrote it; None where it knows no such model, or where it did not answer
    (`failed`).
    """

    found: bytes | None
    until: float
    failed: bool = False


class ProviderEndpoints:
    """`fetch` returns the body of GET /models/{id}/endpoints. A failure is remembered for RETRY_SECONDS, a
    list for `ttl_seconds`.
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
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._fetching: dict[str, asyncio.Task[bytes | None]] = {}
        # Whoever asks for one model after the other must not make us flood the upstream.
        self._gate = asyncio.Semaphore(FETCHES_AT_ONCE)

    def __len__(self) -> int:
        return len(self._kept)

    async def get(self, model_id: str) -> bytes | None:
        """The list, as JSON, or None for a model that the upstream does not know. Raises UpstreamUnavailable."""
        kept = self._kept.get(model_id)
        if kept is not None and self._clock() < kept.until:
            self._kept.move_to_end(model_id)
            if kept.failed:
                raise UpstreamUnavailable(UNREADABLE)
            return kept.found
        task = self._fetching.get(model_id)
        if task is None:
            task = self._fetching[model_id] = asyncio.create_task(
                self._load(model_id), name=f"endpoints of {model_id}"
            )
            task.add_done_callback(lambda done: self._keep(model_id, done))
        return await asyncio.shield(task)

    async def aclose(self) -> None:
        """Stops what is being fetched."""
        running = list(self._fetching.values())
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    async def _load(self, model_id: str) -> bytes | None:
        async with self._gate:
            raw = await self._fetch(model_id)
        if raw is None:
            return None
        try:
            answer = orjson.loads(raw) if len(raw) <= MAX_BYTES else None
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict) or not isinstance(answer.get("data"), dict):
            raise UpstreamUnavailable(UNREADABLE)
        return raw

    def _keep(self, model_id: str, task: asyncio.Task[bytes | None]) -> None:
        del self._fetching[model_id]
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(
            error, GatewayError
        ):  # a fault of ours, which its waiters see
            return
        found = None if error is not None else task.result()
        seconds = self._ttl if error is None else min(self._ttl, RETRY_SECONDS)
        self._kept[model_id] = _Kept(found, self._clock() + seconds, failed=error is not None)
        self._kept.move_to_end(model_id)
        while len(self._kept) > MOST_LISTS:
            self._kept.popitem(last=False)
