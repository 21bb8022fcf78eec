"""Our books beside the upstream's, and the requests whose costs are still open.

Costs are compared for the UTC day, week and month, as OpenRouter counts them itself. They always differ a
little: OpenRouter counts a request when it has ended, we count it at its admission, once it is settled.
"""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Literal, TypedDict

import db
from common.errors import Conflict, GatewayError, NotFound, UpstreamUnavailable
from common.json_types import JsonObject
from common.money import credits_from_nanos, in_credits, parse_amount
from db_rows.books import LiveCosts, UsageRecord
from db_rows.requests import Settled
from db_rows.shared import Mode
from gateway.billing.settlement import Generation, Settlements, settlement
from gateway.upstream.client import Upstream
from supabase_config import AsyncClient

Window = Literal["daily", "weekly", "monthly"]

WINDOWS: tuple[Window, ...] = ("daily", "weekly", "monthly")
KINDS = ("expired", "unknown", "overrun")
PERCENT_PRECISION = Decimal("0.0001")


class WindowComparison(TypedDict):
    """Our costs and the upstream's since `start`, in credits; what the upstream does not tell is None."""

    start: str
    requests: int
    upstream_cost: Decimal
    charged: Decimal
    margin: Decimal
    overrun: Decimal
    upstream_says: Decimal | None
    drift: Decimal | None
    drift_percent: Decimal | None


class Comparison(TypedDict):
    """`upstream` is None, with the reason, where the upstream does not answer."""

    mode: Mode
    upstream_problem: str | None
    upstream: dict[str, Decimal | None] | None
    windows: dict[Window, WindowComparison]


async def compare(client: AsyncClient, upstream: Upstream) -> Comparison:
    """Our costs and the upstream's, window by window."""
    ours = await db.reconcile_costs(client)
    account, problem = await _account(upstream)
    amounts = None
    if account is not None:
        amounts = {name: parse_amount(account.get(name)) for name in ("usage", "limit", "limit_remaining")}
    return {
        "mode": ours["mode"],
        "upstream_problem": problem,
        "upstream": amounts,
        "windows": {window: _compare_window(window, ours[window], account) for window in WINDOWS},
    }


async def _account(upstream: Upstream) -> tuple[JsonObject | None, str | None]:
    """The operator's account at the upstream, or why it cannot be read."""
    try:
        account = await upstream.read_account()
    except UpstreamUnavailable as error:
        return None, error.message
    return account, None if account is not None else "The upstream refuses the operator's key."


def _compare_window(window: Window, ours: LiveCosts, account: JsonObject | None) -> WindowComparison:
    cost = credits_from_nanos(int(ours["upstream_cost_nanos"]))
    charged = credits_from_nanos(int(ours["charged_nanos"]))
    theirs = None if account is None else parse_amount(account.get(f"usage_{window}"))
    return {
        "start": ours["start"],
        "requests": ours["requests"],
        "upstream_cost": cost,
        "charged": charged,
        "margin": charged - cost,
        "overrun": credits_from_nanos(int(ours["overrun_nanos"])),
        "upstream_says": theirs,
        "drift": None if theirs is None else theirs - cost,
        "drift_percent": _percent(theirs, cost),
    }


def _percent(theirs: Decimal | None, ours: Decimal) -> Decimal | None:
    if theirs is None or ours == 0:
        return None
    return (100 * (theirs - ours) / ours).quantize(PERCENT_PRECISION)


async def open_items(
    client: AsyncClient, kind: str, *, before: str | None, limit: int
) -> list[dict[str, object]]:
    """The open items of one kind, newest first, with amounts in credits."""
    # First, so that what has been closed since the last sweep is listed, too.
    await db.note_open_items(client)
    rows = await db.list_open_items(client, kind, before=before, limit=limit)
    return [in_credits(row) for row in rows]


def waiting_in(folder: Path) -> list[str]:
    """Ids of the requests whose settlements wait in this instance's journal for the database."""
    return sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []


async def resolve(client: AsyncClient, settlements: Settlements, request_id: str) -> tuple[Settled, str]:
    """Asks the upstream once more what a request cost that was settled without knowing it, and charges that.
    Returns the charge and the generation's id; a record is charged so once.

    Raises NotFound where there is no such request or the upstream does not know it, Conflict where there is
    nothing to resolve, UpstreamUnavailable.
    """
    record = await db.get_record(client, request_id)
    if record is None:
        raise NotFound("There is no request of this id.", param="request_id")
    generation = _unresolved_generation(record)
    usage = await settlements.look_up(generation, (0.0,))
    if usage is None:
        raise NotFound(
            "The upstream does not know this generation.", param="request_id", code="generation_unknown"
        )
    status = record["status"]
    # A request that expired has ended since: its client is gone.
    ended = "cancelled" if status == "expired" or status == "pending" else status
    charge = await settlements.settle(settlement(request_id, ended, "generation", usage))
    if charge is None:
        raise GatewayError()
    return charge, generation.generation_id


def _unresolved_generation(record: UsageRecord) -> Generation:
    """The generation whose cost is not known. Raises Conflict where there is none to ask about."""
    if record["settlement_source"] != "none":
        raise Conflict("The cost of this request is known, or it is still pending.", param="request_id")
    generation_id = record["generation_id"]
    # Under a user's own key nothing was charged, and the operator's account does not know the generation.
    if generation_id is None or record["byok"]:
        raise Conflict(
            "The upstream cannot be asked about this request.", param="request_id", code="not_resolvable"
        )
    return Generation(record["mode"], record["environment"], generation_id)
