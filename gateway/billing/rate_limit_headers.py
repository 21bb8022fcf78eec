"""The tightest limits of a key in OpenAI's response headers and in those of the IETF's draft."""

from __future__ import annotations

from db_rows.requests import LimitsLeft


def limit_headers(limits: LimitsLeft) -> dict[str, str]:
    """Headers for requests and tokens; {} where nothing is limited.

    OpenAI's are `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`; `RateLimit` and `RateLimit-Policy`
    follow draft-ietf-httpapi-ratelimit-headers.
    """
    units = {
        "requests": (limits.get("request_limit"), limits.get("request_left"), limits.get("request_reset")),
        "tokens": (limits.get("token_limit"), limits.get("token_left"), limits.get("token_reset")),
    }
    headers: dict[str, str] = {}
    states, policies = [], []
    for unit, (limit, remaining, reset) in units.items():
        if limit is None or remaining is None:
            continue
        remaining = max(0, remaining)  # a limit that was lowered may be overdrawn
        headers[f"x-ratelimit-limit-{unit}"] = str(limit)
        headers[f"x-ratelimit-remaining-{unit}"] = str(remaining)
        headers[f"x-ratelimit-reset-{unit}"] = f"{reset}s"
        states.append(f'"{unit}";r={remaining};t={reset}')
        policies.append(f'"{unit}";q={limit}')
    if states:
        headers["RateLimit"] = ", ".join(states)
        headers["RateLimit-Policy"] = ", ".join(policies)
    return headers
