"""All routers, in the order in which they are asked."""

from __future__ import annotations

from routes import account as users
from routes import budgets as spending
from routes import internal, keys, plans, public, receipts
from routes import model_catalog as model_listings
from routes import openrouter_account as account_views
from routes import webhooks as notifications
from routes.admin import accounts as admin
from routes.admin import monitoring as operations
from routes.admin import reconciliation

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
