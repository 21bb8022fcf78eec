"""Refusals of the database as HTTP errors: those that several areas share."""

from __future__ import annotations

from typing import Literal

from common.errors import Conflict, NotFound


def taken(outcome: Literal["username_taken", "email_taken"], *, name_field: str) -> Conflict:
    """Another account has this name or address. `name_field`: what the body calls the user's name."""
    if outcome == "username_taken":
        return Conflict("This username is already registered.", param=name_field)
    return Conflict("This email is already registered.", param="email")


def caller_gone() -> NotFound:
    """The account was deleted, or its key revoked, since the key was verified."""
    return NotFound("This account or key no longer exists.")


def no_such_target(field: str) -> NotFound:
    """The user or key that an administrator means does not exist; `field` named it."""
    what = "API key; give it in full" if field == "api_key" else "user"
    return NotFound(f"There is no such {what}.", code="user_not_found", param=field)
