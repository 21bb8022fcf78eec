"""The providers that stop billing when the connection closes."""

from __future__ import annotations

import re

# They stop generating, and billing, when the connection is closed: OpenRouter's documentation, "Stream
# cancellation". A provider that is not here generates, and bills, to the end.
STOPS_ON_ABORT = frozenset(
    [
        "openai",
        "azure",
        "anthropic",
        "fireworks",
        "mancer",
        "recursal",
        "anyscale",
        "lepton",
        "octoai",
        "novita",
        "deepinfra",
        "together",
        "cohere",
        "hyperbolic",
        "infermatic",
        "avian",
        "xai",
        "cloudflare",
        "sfcompute",
        "nineteen",
        "liquid",
        "friendli",
        "chutes",
        "deepseek",
    ]
)


def stops_on_abort(provider: str | None) -> bool:
    """Whether closing the connection ends the bill at this provider (given by the name in its answers)."""
    return provider is not None and re.sub(r"[^a-z0-9]", "", provider.lower()) in STOPS_ON_ABORT
