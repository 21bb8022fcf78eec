"""Outcomes of the database as HTTP errors. The errors that several areas' orders share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import Conflict, NotFound


def raise_taken(found: Mapping[str, Any], *, name_field: str) -> None:
    """Raises Conflict for a name or an address that another account has. `name_field`: what the order calls
    the user's name.
    """
    fields = {"username_taken": ("username", name_field), "email_taken": ("email", "email")}
    if found["outcome"] in fields:
        what, field = fields[found["outcome"]]
        raise Conflict(f"This {what} is already registered.", param=field)


def require_found(found: Mapping[str, Any], field: str) -> None:
    """Raises NotFound for an order whose user or key does not exist; `field` named it."""
    if found["outcome"] == "not_found":
        what = "API key; give it in full" if field == "api_key" else "user"
        raise NotFound(f"There is no such {what}.", code="user_not_found", param=field)
