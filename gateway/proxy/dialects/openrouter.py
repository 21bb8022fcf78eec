"""The dialects as OpenRouter's own clients expect them, for requests under /api/v1.

Only errors differ (docs/decisions/0009): their `code` is a status, and their word `metadata.error_type`
(https://openrouter.ai/docs/api-reference/errors). OpenRouter's SDK rejects an event of another form, and
with it the whole stream.
"""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import GatewayError
from common.json_types import Json, JsonObject
from gateway.proxy.dialects.base import AnswerState, Sanitise
from gateway.proxy.dialects.chat import CHAT, Dialect, own_chunk
from gateway.proxy.dialects.messages import MESSAGES
from gateway.proxy.dialects.responses import RESPONSES, Responses

# The status that each of OpenRouter's error types means, of those that may be shown to a client (its OpenAPI
# file, August 2026). Any other means 502.
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
    """Chat completions: every `code` is a status, and an error of ours is a whole chunk."""

    def show_error(self, error: JsonObject, sanitise: Sanitise) -> dict[str, Json]:
        shown = sanitise(error)
        code, metadata = shown["code"], shown.get("metadata")
        if isinstance(code, int):
            return shown
        error_type = metadata.get("error_type") if isinstance(metadata, dict) else code
        status = STATUSES.get(str(error_type), 502)
        return {**shown, "code": status, "metadata": {"error_type": error_type}}

    def failure_data(self, failure: GatewayError, state: AnswerState, request_id: str) -> dict[str, Json]:
        choice: Json = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
        return {**own_chunk(state, choice), **failure.openrouter_body(request_id)}


class OpenRouterResponses(Responses):
    """Responses: `code` stays a word, as in OpenRouter's own events; only the envelope beside it differs."""

    def _envelope(self, failure: GatewayError, request_id: str) -> dict[str, Json]:
        return failure.openrouter_body(request_id)


# Messages keep Anthropic's form: their clients are Anthropic's under either prefix.
FOR_OPENROUTER: Mapping[Dialect, Dialect] = {
    CHAT: OpenRouterChat(),
    RESPONSES: OpenRouterResponses(),
    MESSAGES: MESSAGES,
}
