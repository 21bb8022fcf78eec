"""The billable endpoints. A path that is not listed here must never reach the upstream."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gateway.proxy.dialects.chat import CHAT, Dialect
from gateway.proxy.dialects.messages import MESSAGES
from gateway.proxy.dialects.openrouter import FOR_OPENROUTER
from gateway.proxy.dialects.responses import RESPONSES

OPENROUTER_PREFIX = "/api/v1"
PREFIXES = ("/v1", OPENROUTER_PREFIX)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One billable endpoint. `name` is its path, here and upstream, and its name in records; it decides how
    the cost is bounded.
    """

    name: str
    resource: str  # the word for it in a key's scopes
    dialect: Dialect = CHAT
    paths: tuple[str, ...] = ()  # more paths of ours that lead to it
    may_stream: bool = False
    takes_forms: bool = False
    answers_bytes: bool = False

    @property
    def all_paths(self) -> tuple[str, ...]:
        """Every path under which it is served."""
        return tuple(f"{prefix}/{path}" for path in (self.name, *self.paths) for prefix in PREFIXES)

    def at(self, path: str) -> Endpoint:
        """The endpoint as it is served at this path: under OpenRouter's prefix, errors have OpenRouter's
        form.
        """
        return replace(self, dialect=FOR_OPENROUTER[self.dialect]) if is_openrouter(path) else self


ENDPOINTS = (
    Endpoint("chat/completions", "chat", may_stream=True),
    Endpoint("completions", "completions", may_stream=True),
    Endpoint("embeddings", "embeddings"),
    Endpoint("responses", "responses", RESPONSES, may_stream=True),
    Endpoint("messages", "messages", MESSAGES, may_stream=True),
    Endpoint("rerank", "rerank"),
    Endpoint("images", "images", paths=("images/generations",)),  # OpenRouter's path, and OpenAI's
    Endpoint("audio/speech", "audio", answers_bytes=True),
    Endpoint("audio/transcriptions", "audio", takes_forms=True),
)
BY_PATH = {path: endpoint for endpoint in ENDPOINTS for path in (endpoint.name, *endpoint.paths)}


def endpoint_of(path: str) -> Endpoint:
    """The endpoint that is served at this path (without its prefix). Raises KeyError."""
    return BY_PATH[path]


def is_anthropic(path: str) -> bool:
    """Whether clients of this path expect Anthropic's form of errors."""
    return any(path == f"{prefix}/messages" or path.startswith(f"{prefix}/messages/") for prefix in PREFIXES)


def is_openrouter(path: str) -> bool:
    """Whether clients of this path expect OpenRouter's form of errors: all below its prefix, except
    Anthropic's endpoint.
    """
    return path.startswith(f"{OPENROUTER_PREFIX}/") and not is_anthropic(path)
