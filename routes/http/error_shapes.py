"""An error in the form that the clients of a path expect: OpenAI's, OpenRouter's or Anthropic's."""

from __future__ import annotations

from fastapi import Request

from common.errors import GatewayError
from gateway.proxy.endpoints import is_anthropic, is_openrouter
from routes.http.responses import JsonResponse


def error_reply(error: GatewayError, request_id: str, path: str = "") -> JsonResponse:
    """The response for an error, in the form that clients of this path expect."""
    if is_anthropic(path):
        body = error.anthropic_body(request_id)
    elif is_openrouter(path):
        body = error.openrouter_body(request_id)
    else:
        body = error.body(request_id)
    return JsonResponse(body, status_code=error.status, headers=error.headers())


def request_id_of(request: Request) -> str:
    return str(getattr(request.state, "request_id", ""))
