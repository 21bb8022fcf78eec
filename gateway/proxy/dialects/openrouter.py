"""The same for OpenRouter's clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import GatewayError
from gateway.proxy.dialects.base import AnswerState, Sanitise
from gateway.proxy.dialects.chat import CHAT, Dialect, own_chunk
from gateway.proxy.dialects.messages import MESSAGES
from gateway.proxy.dialects.responses import RESPONSES, Responses

# What OpenRouter's error types mean as a status, of those that an upstream may tell (its OpenAPI file, August
# 2026).
STATUSES = {
    "invalid_request": 400,
    "invalid_prompt": 400,
    "context_length_exceeded": 400,
    "max_tokens_exceeded": 400,
    "token_limit_exceeded": 400,
    "string_too_long": 400,
    "content_policy_violation": 400,
    "refusal": 400,
    "permission_denied": 403,
    "not_found": 404,
    "payload_too_large": 413,
    "unprocessable": 422,
    "rate_limit_exceeded": 429,
    "provider_overloaded": 503,
    "upstream_unavailable": 503,
    "timeout": 504,
}


class OpenRouterChat(Dialect):
    """Chat completions as OpenRouter's clients read their errors: every `code` is a status, and an error
    event is a chunk.
    """

    def show_error(self, error: Mapping[str, Any], sanitise: Sanitise) -> dict[str, Any]:
        shown = sanitise(error)
        code = shown["code"]
        if isinstance(code, int):
            return shown
        about = shown.get("metadata") or {"error_type": code}
        return {**shown, "code": STATUSES.get(about["error_type"], 502), "metadata": about}

    def failure_event(self, failure: GatewayError, state: AnswerState, request_id: str) -> dict[str, Any]:
        choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
        return {**own_chunk(state, (choice,)), **failure.openrouter_body(request_id)}


CHAT_FOR_OPENROUTER = OpenRouterChat()


class OpenRouterResponses(Responses):
    """Responses name their errors by words for OpenRouter's clients, too; what is ours beside that has
    OpenRouter's form.
    """

    def failure_event(self, failure: GatewayError, state: AnswerState, request_id: str) -> dict[str, Any]:
        return failure.openrouter_body(request_id)


FOR_OPENROUTER: Mapping[Dialect, Dialect] = {
    CHAT: CHAT_FOR_OPENROUTER,
    RESPONSES: OpenRouterResponses(),
    MESSAGES: MESSAGES,
}
