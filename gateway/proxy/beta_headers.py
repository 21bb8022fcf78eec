"""The Anthropic beta features that may pass: those that change neither the cost of a request nor whose data
it reaches.

OpenRouter takes their names in `x-anthropic-beta` (its guide to provider routing), Anthropic's own clients
send `anthropic-beta`. A name that is not here is left out, as if it had not been sent: files and skills would
be those of the operator's account, containers cost by the hour, and nobody knows what a new feature does
(docs/decisions/0010).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

HEADERS = ("anthropic-beta", "x-anthropic-beta")
FEATURES = frozenset(
    (
        "claude-code",
        "context-management",  # the edits themselves are bounded with the body
        "effort",
        "extended-cache-ttl",
        "fine-grained-tool-streaming",
        "interleaved-thinking",
        "mid-conversation-system",
        "prompt-caching-scope",
        "structured-outputs",
        "thinking-token-count",
        "token-efficient-tools",
    )
)
# A feature is sent with the date of its version, of which any may pass.
DATED = re.compile(r"([a-z-]{1,64})-\d{4}-?\d{2}-?\d{2}")


def beta_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The beta headers of a request, as they go out to the upstream."""
    passing = {
        name: ",".join(filter(_may_pass, headers[name].replace(" ", "").split(",")))
        for name in HEADERS
        if name in headers
    }
    return {name: features for name, features in passing.items() if features}


def _may_pass(name: str) -> bool:
    dated = DATED.fullmatch(name)
    return dated is not None and dated[1] in FEATURES
