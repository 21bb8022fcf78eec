"""Our books beside the upstream's.

Costs are compared for the UTC day, week and month, as OpenRouter counts them itself. They differ a little at
any time: OpenRouter counts a request when it has ended, we by when it was admitted and once it is settled.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import db
from common.errors import Conflict, GatewayError, NotFound, UpstreamUnavailable
from common.money import credits_from_nanos, parse_amount
from gateway.billing.settlement import Settlements, settlement
from gateway.upstream.client import Upstream
from supabase_config import AsyncClient

WINDOWS: tuple[Literal["daily", "weekly", "monthly"], ...] = ("daily", "weekly", "monthly")
KINDS = ("expired", "unknown", "overrun")


async def compare(client: AsyncClient, upstream: Upstream) -> dict[str, Any]:
    """Our costs and the upstream's, window by window; `upstream` is null, with the reason, where it does not
    answer.
    """
    ours = await db.reconcile_costs(client)
    theirs, problem = await _account(upstream)
    return {
        "mode": ours["mode"],
        "upstream_problem": problem,
        "upstream": None
        if theirs is None
        else {name: parse_amount(theirs.get(name)) for name in ("usage", "limit", "limit_remaining")},
        "windows": {window: _window(window, ours[window], theirs) for window in WINDOWS},
    }


async def _account(upstream: Upstream) -> tuple[Mapping[str, Any] | None, str | None]:
    try:
        found = await upstream.read_account()
    except UpstreamUnavailable as error:
        return None, error.message
    return found, None if found is not None else "The upstream refuses the operator's key."


def _window(window: str, ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> dict[str, Any]:
    cost, charged, overrun = (
        credits_from_nanos(int(ours[f"{name}_nanos"])) for name in ("upstream_cost", "charged", "overrun")
    )
    told = None if theirs is None else parse_amount(theirs.get(f"usage_{window}"))
    return {
        "start": ours["start"],
        "requests": ours["requests"],
        "upstream_cost": cost,
        "charged": charged,
        "margin": charged - cost,
        "overrun": overrun,
        "upstream_says": told,
        "drift": None if told is None else told - cost,
        "drift_percent": None
        if told is None or cost == 0
        else (100 * (told - cost) / cost).quantize(Decimal("0.0001")),
    }


async def open_items(
    client: AsyncClient, kind: str, *, before: str | None, limit: int
) -> list[dict[str, Any]]:
    """What of one kind is open, newest first, with amounts in credits."""
    await db.note_open_items(client)
    return [_shown(row) for row in await db.list_open_items(client, kind, before=before, limit=limit)]


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its amounts in credits; a cost that was never known is null."""
    amounts = {
        name.removesuffix("_nanos"): None if value is None else credits_from_nanos(value)
        for name, value in row.items()
        if name.endswith("_nanos")
    }
    return {**{name: value for name, value in row.items() if not name.endswith("_nanos")}, **amounts}


def waiting_in(folder: Path) -> list[str]:
    """Ids of the requests whose settlements wait in this instance's journal for the database."""
    return sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []


async def resolve(client: AsyncClient, settlements: Settlements, request_id: str) -> dict[str, Any]:
    """Asks the upstream again what a request cost that was settled without knowing it, and charges that:
    once.

    Raises NotFound where there is no such request or the upstream does not know it, Conflict where there is
    nothing to resolve, UpstreamUnavailable.
    """
    record = await db.get_record(client, request_id)
    if record is None:
        raise NotFound("There is no request of this id.", param="request_id")
    if record["settlement_source"] != "none":
        raise Conflict("The cost of this request is known, or it is still pending.", param="request_id")
    if record["generation_id"] is None or record["byok"]:
        raise Conflict(
            "The upstream cannot be asked about this request.", param="request_id", code="not_resolvable"
        )
    found = await settlements.look_up(record, (0.0,))
    if found is None:
        raise NotFound(
            "The upstream does not know this generation.", param="request_id", code="generation_unknown"
        )
    status = "cancelled" if record["status"] == "expired" else record["status"]
    settled = await settlements.settle(settlement(request_id, status, "generation", found))
    if settled is None:
        raise GatewayError()
    return {**settled, "generation_id": record["generation_id"]}
