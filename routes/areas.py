"""Which areas of routes are there, and in which order are they asked?"""

from __future__ import annotations

from routes import (
    account_views,
    admin,
    internal,
    keys,
    model_listings,
    notifications,
    operations,
    plans,
    public,
    receipts,
    reconciliation,
    spending,
    users,
)

AREAS = (
    model_listings,
    public,
    account_views,
    receipts,
    users,
    spending,
    notifications,
    keys,
    plans,
    admin,
    operations,
    reconciliation,
    internal,
)
ROUTERS = tuple(area.router for area in AREAS)
