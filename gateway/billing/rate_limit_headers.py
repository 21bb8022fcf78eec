"""OpenAI's and the IETF's headers of the tightest limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def limit_headers(limits: Mapping[str, Any]) -> dict[str, str]:
    """The tightest limits in OpenAI's headers and in those of the IETF draft
    (draft-ietf-httpapi-ratelimit-headers).
    """
    found: dict[str, str] = {}
    states, policies = [], []
    for unit, name in (("requests", "request"), ("tokens", "token")):
        limit, left, reset = (limits.get(f"{name}_{part}") for part in ("limit", "left", "reset"))
        if limit is None or left is None:
            continue
        found[f"x-ratelimit-limit-{unit}"] = str(limit)
        found[f"x-ratelimit-remaining-{unit}"] = str(max(0, left))
        found[f"x-ratelimit-reset-{unit}"] = f"{reset}s"
        states.append(f'"{unit}";r={max(0, left)};t={reset}')
        policies.append(f'"{unit}";q={limit}')
    if states:
        found["RateLimit"] = ", ".join(states)
        found["RateLimit-Policy"] = ", ".join(policies)
    return found
