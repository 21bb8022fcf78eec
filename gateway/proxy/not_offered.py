"""Paths of other APIs that are refused by name."""

from __future__ import annotations

from gateway.proxy.endpoints import PREFIXES

NO_STORE = "The gateway keeps no conversations, files or jobs: what a request needs goes into the request."
NOT_UPSTREAM = "OpenRouter has no such endpoint."
OPERATORS = "That belongs to the operator's account at the model provider."


# A name that ends with a slash: what lies below it.
NOT_OFFERED = {
    **dict.fromkeys(
        (
            "moderations",
            "images/edits",
            "images/variations",
            "audio/translations",
            "audio/voices",
            "audio/voice_consents",
            "realtime",
            "fine_tuning",
            "fine-tunes",
            "evals",
            "engines",
            "edits",
            "answers",
            "classifications",
            "search",
            "complete",
        ),
        NOT_UPSTREAM,
    ),
    **dict.fromkeys(
        (
            "files",
            "uploads",
            "assistants",
            "threads",
            "batches",
            "vector_stores",
            "containers",
            "conversations",
            "skills",
            "chatkit",
            "videos",
            "chat/completions/",
            "responses/",
            "messages/",
        ),
        NO_STORE,
    ),
    **dict.fromkeys(
        (
            "keys",
            "activity",
            "analytics",
            "generation/content",
            "byok",
            "guardrails",
            "workspaces",
            "presets",
            "observability",
            "organization",
            "organizations",
            "auth",
            "datasets",
            "private",
        ),
        OPERATORS,
    ),
}


def not_offered_reason(path: str) -> str | None:
    """Why a path of OpenAI's, Anthropic's or OpenRouter's API is not served here; None for any other."""
    prefix = next((prefix for prefix in PREFIXES if path.startswith(f"{prefix}/")), None)
    asked = path[len(prefix) + 1 :] if prefix is not None else ""
    found = next((name for name in NOT_OFFERED if _covers(name, asked)), None)
    if found is None:
        return None
    what = f"Nothing below `{found[:-1]}` is" if found.endswith("/") else f"`{found}` is not"
    return f"{what} offered here. {NOT_OFFERED[found]}"


def _covers(name: str, asked: str) -> bool:
    if name.endswith("/"):
        return asked.startswith(name) and asked != name
    return asked == name or asked.startswith(f"{name}/")
