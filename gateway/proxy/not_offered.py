"""Paths of OpenAI's, Anthropic's and OpenRouter's APIs that exist there and are refused here, by name.

With a plain 404 a client would look for a typing error of its own.
"""

from __future__ import annotations

from gateway.proxy.endpoints import PREFIXES

NO_STORE = "The gateway keeps no conversations, files or jobs: what a request needs goes into the request."
NOT_UPSTREAM = "OpenRouter has no such endpoint."
OPERATORS = "That belongs to the operator's account at the model provider."

# A name covers itself and all below it; one that ends with a slash only what is below it.
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
            # Answers that OpenAI and Anthropic store, and jobs: /responses/{id}, /messages/batches.
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
    rest = "" if prefix is None else path[len(prefix) + 1 :]
    name = next((name for name in NOT_OFFERED if _covers(name, rest)), None)
    if name is None:
        return None
    subject = f"Nothing below `{name[:-1]}` is" if name.endswith("/") else f"`{name}` is not"
    return f"{subject} offered here. {NOT_OFFERED[name]}"


def _covers(name: str, path: str) -> bool:
    if name.endswith("/"):
        return path.startswith(name) and path != name
    return path == name or path.startswith(f"{name}/")
