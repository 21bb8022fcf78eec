"""/admin/reconciliation: our costs beside the upstream's, what is still open, and one more look at a cost
that nobody knew.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Query
from fastapi.responses import Response

import db_security
from common.money import credits_from_nanos
from db_rows.requests import Settled
from gateway.billing import reconciliation
from gateway.runtime.instance import Runtime
from models import errors_of
from routes.dependencies import Admin, AdminOnly, Declared, Running
from routes.http.json_body import ExactRoute
from routes.http.pagination import Cursor, PageSize, cursor_of, request_id_of
from routes.http.responses import success, utc_now

router = APIRouter(
    prefix="/admin/reconciliation",
    tags=["admin"],
    route_class=ExactRoute,
    dependencies=Declared,
    responses=errors_of(400, 401, 403, 404, 409, 503),
)

EXAMPLE: dict[str, Any] = {
    "status": "success",
    "mode": "live",
    "upstream": {"usage": 812.5, "limit": None, "limit_remaining": None},
    "upstream_problem": None,
    "windows": {
        "daily": {
            "start": "2026-11-24T00:00:00+00:00",
            "requests": 1200,
            "upstream_cost": 3.25,
            "charged": 3.575,
            "margin": 0.325,
            "overrun": 0,
            "upstream_says": 3.2507,
            "drift": 0.0007,
            "drift_percent": 0.0215,
        }
    },
    "open": {"expired": [], "unknown": [], "overrun": []},
    "journal_waiting": [],
    "timestamp": "2026-11-24T12:00:00+00:00",
}
Kind = Literal["expired", "unknown", "overrun"]
SHOWN_AT_ONCE = 20


@router.get(
    "",
    summary="What we charged beside what the upstream says",
    responses={200: {"content": {"application/json": {"example": EXAMPLE}}}},
)
async def reconcile(runtime: Running, admin: AdminOnly) -> Response:
    """Live requests by UTC day, week and month, without those of test keys and those that went out with
    users' own keys.

    If the upstream does not answer, `upstream` is null, and the reason is given. Of what is open, the newest
    twenty of each kind are shown.
    """
    comparison = await reconciliation.compare(runtime.client, runtime.upstream(None))
    items = {
        kind: await reconciliation.open_items(runtime.client, kind, before=None, limit=SHOWN_AT_ONCE)
        for kind in reconciliation.KINDS
    }
    waiting = reconciliation.waiting_in(runtime.journal_folder)
    return success(**comparison, open=items, journal_waiting=waiting, timestamp=utc_now())


@router.get("/items", summary="What is open: expired holds, unknown costs, overruns")
async def list_items(
    runtime: Running,
    admin: AdminOnly,
    kind: Annotated[
        Kind,
        Query(description="`expired`: pending beyond its hold; `unknown`: settled without a cost; `overrun`"),
    ],
    limit: PageSize = 100,
    cursor: Cursor = None,
) -> Response:
    items = await reconciliation.open_items(runtime.client, kind, before=request_id_of(cursor), limit=limit)
    following = cursor_of(str(items[-1]["request_id"])) if len(items) == limit else None
    return success(kind=kind, items=items, next_cursor=following)


@router.post("/{request_id}/resolve", summary="Ask the upstream once more what a request cost")
async def resolve(
    runtime: Running,
    admin: AdminOnly,
    request_id: Annotated[UUID, Path(description="Of a request that was settled without a known cost")],
) -> Response:
    """Charges what the upstream says now, as far as the account's credits go. A record is amended once."""
    charge, generation_id = await reconciliation.resolve(runtime.client, runtime.settlements, str(request_id))
    # After the charge, so that the audit log never names one that was not made.
    await _record(runtime, admin, charge, generation_id)
    now = charge["outcome"] == "settled"
    return success(
        message="Charged what the upstream says" if now else "Was resolved before",
        request_id=str(request_id),
        charged=credits_from_nanos(charge["cost_nanos"]),
        overrun=credits_from_nanos(charge["overrun_nanos"]),
    )


async def _record(runtime: Runtime, admin: Admin, charge: Settled, generation_id: str) -> None:
    await db_security.write_audit(
        runtime.client,
        admin.stamp(),
        action="resolve_request",
        target=f"request:{charge['request_id']}",
        user_id=charge["user_id"],
        details={
            "generation_id": generation_id,
            "cost_nanos": charge["cost_nanos"],
            "outcome": charge["outcome"],
        },
    )
