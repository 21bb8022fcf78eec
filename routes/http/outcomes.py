"""Outcomes of the database as HTTP errors: those that several areas share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import Conflict, NotFound


def raise_taken(result: Mapping[str, Any], *, name_field: str) -> None:
    """Raises Conflict for a name or an address that another account has. `name_field`: what the body calls
    the user's name.
    """
    fields = {"username_taken": ("username", name_field), "email_taken": ("email", "email")}
    if result["outcome"] in fields:
        what, field = fields[result["outcome"]]
        raise Conflict(f"This {what} is already registered.", param=field)


def require_found(
    result: Mapping[str, Any],
    message: str = "This account or key no longer exists.",
    *,
    param: str | None = None,
    code: str = NotFound.code,
) -> None:
    """Raises NotFound for a change of something that does not exist."""
    if result["outcome"] == "not_found":
        raise NotFound(message, param=param, code=code)


def require_target(result: Mapping[str, Any], field: str) -> None:
    """Raises NotFound for an administrator's change whose user or key does not exist; `field` named it."""
    what = "API key; give it in full" if field == "api_key" else "user"
    require_found(result, f"There is no such {what}.", param=field, code="user_not_found")
