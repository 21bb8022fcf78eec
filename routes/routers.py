"""All routers, in the order in which they are tried: the first route that matches a path serves it."""

from __future__ import annotations

from routes import (
    account,
    budgets,
    internal,
    keys,
    model_catalog,
    openrouter_account,
    plans,
    public,
    receipts,
    webhooks,
)
from routes.admin import accounts, monitoring, reconciliation

AREAS = (
    model_catalog,
    public,
    openrouter_account,
    receipts,
    account,
    budgets,
    webhooks,
    keys,
    plans,
    accounts,
    monitoring,
    reconciliation,
    internal,
)
ROUTERS = tuple(area.router for area in AREAS)
