"""What an instance does on the side: it sweeps up after crashed requests and brings the usage sums up to
date.

Nothing depends on it: any instance may do it, or none, and a scheduler may ask for it through
/internal/sweep.
"""

from __future__ import annotations

import asyncio

import structlog

import db
from gateway.runtime.instance import Runtime

log = structlog.get_logger("runtime")

SWEEP_SECONDS = 60.0
# Each round deletes a thousand stored answers at most.
DELETE_ROUNDS = 30


async def sweep(runtime: Runtime) -> dict[str, int]:
    """Ends the requests that crashed instances left behind, sends due webhook deliveries, and deletes stored
    answers that have expired. Returns counts: expired and resolved holds.
    """
    counts = await runtime.settlements.sweep(
        lambda limit, skip: db.list_expired_holds(runtime.client, limit, skip)
    )
    await runtime.deliveries.deliver_due()
    for _ in range(DELETE_ROUNDS):
        if not await db.delete_expired_answers(runtime.client):
            break
    return counts


async def sum_up(runtime: Runtime) -> None:
    """Brings the usage sums up to what is closed, at most a day at a time."""
    while await db.sum_up_usage(runtime.client):
        pass
    await db.note_open_items(runtime.client)


async def maintain_for_ever(runtime: Runtime) -> None:
    """Does both every minute. What goes wrong is logged: the next round tries again."""
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            await sweep(runtime)
            await sum_up(runtime)
        except Exception as error:
            log.error("sweep_failed", exc_info=error)
