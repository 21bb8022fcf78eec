"""Reads fields that several endpoints have in common. A field of the wrong type is refused or counts as
absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .failures import invalid_request


def objects(value: object) -> list[Mapping[str, object]]:
    """The JSON objects in a list. Anything else, such as a missing list, counts as none."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def require_positive(value: object, message: str) -> int:
    """The value as a whole number of at least 1; raises Refusal (400) with the message for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise invalid_request(message)
    return value


def require_role(message: Mapping[str, object], roles: Sequence[str], path: str) -> object:
    """The message's role; raises Refusal (400) unless it is one of these. `path` is where the message is."""
    role = message.get("role")
    if role not in roles:
        allowed = "|".join(f'"{name}"' for name in roles)
        raise invalid_request(f"{path}.role: Invalid option: expected one of {allowed}")
    return role
