"""What does /docs say of the endpoints that the framework does not serve itself? The proxy's, as OpenAPI."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

DESCRIPTION = """OpenAI-compatible access to hundreds of models through OpenRouter, on prepaid credits.

Point any OpenAI or OpenRouter SDK at this base URL (`/v1` or `/api/v1`) with a key of this gateway. Every request holds an upper bound of
its cost before anything is sent, and is charged exactly what it cost. Keys that begin with `gw_test_` are answered by a built-in sandbox,
free of charge."""

ERRORS = {
    "400": "The request is not valid; `error.param` names the field",
    "401": "The API key is missing, unknown, revoked or expired",
    "402": "The credits or the key's budget do not cover the upper bound of this request's cost",
    "403": "The key's scopes or restrictions do not allow this",
    "404": "The model does not exist",
    "413": "The body is too large",
    "429": "A rate, plan or concurrency limit is reached; `Retry-After` says when to come back",
    "502": "The model provider failed",
    "503": "The model provider or the gateway's database cannot serve now",
    "504": "The model provider did not answer in time",
}

CHAT: dict[str, Any] = {
    "tags": ["proxy"],
    "summary": "A chat completion, plain or streamed",
    "description": "OpenAI's and OpenRouter's request and answer, passed through; every field reaches the model. The answer carries "
    "`gateway_usage` (request_id, tokens_charged, cost, user_balance_after), in a stream within the usage event. With "
    "`x-sandbox-scenario` the sandbox plays a failure.",
    "operationId": "create_chat_completion",
    "security": [{"bearer": []}, {"APIKeyHeader": []}],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model", "messages"],
                    "properties": {
                        "model": {"type": "string"},
                        "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
                        "stream": {"type": "boolean", "default": False},
                        "max_tokens": {"type": "integer", "minimum": 1},
                    },
                    "additionalProperties": True,
                },
                "example": {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Say hello."}]},
            }
        },
    },
}


def _chat() -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    answers: dict[str, Any] = {status: {"description": text, "content": error} for status, text in ERRORS.items()}
    answers["200"] = {
        "description": "The completion, or server-sent events with `stream: true`",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}},
    }
    return {**CHAT, "responses": dict(sorted(answers.items()))}


def _say_400(schema: dict[str, Any]) -> None:
    """Wrong input is answered with 400 and our envelope, not with the framework's 422; an oversized body with 413, anywhere."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    for operations in schema["paths"].values():
        for operation in operations.values():
            answers = operation["responses"]
            if answers.pop("422", None) is not None:
                answers["400"] = {"description": ERRORS["400"], "content": error}
            if "requestBody" in operation:
                answers.setdefault("413", {"description": ERRORS["413"], "content": error})
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


ASSETS = "/docs/assets"


def add_documentation_page(app: FastAPI) -> None:
    """/docs without a CDN: its assets come from a package, which is found without being imported."""
    spec = find_spec("fastapi_offline")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("fastapi-offline is not installed; it stands in requirements.txt")
    app.mount(ASSETS, StaticFiles(directory=Path(spec.origin).parent / "static"), name="documentation assets")

    @app.get("/docs", include_in_schema=False)
    async def read_documentation() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url=app.openapi_url or "/openapi.json",
            title=app.title,
            swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{ASSETS}/favicon.png",
        )


def document_proxy(app: FastAPI) -> None:
    """Adds the proxy's endpoints to the application's OpenAPI."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            schema["paths"]["/v1/chat/completions"] = {"post": _chat()}
            _say_400(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
