"""The OpenAPI document and /docs: what the framework knows, and the proxy's endpoints, which it does not."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from models import ERROR_SCHEMA, ErrorBody
from routes.http.proxy_operations import ERRORS, OPENROUTER_ERROR, OPERATIONS

DESCRIPTION = (
    "OpenAI-compatible access to hundreds of models through OpenRouter, on prepaid credits.\n\n"
    "Point any OpenAI or OpenRouter SDK at this base URL (`/v1` or `/api/v1`) with a key of this gateway. "
    "Every request holds an upper bound of its cost before anything is sent, and is charged exactly what it "
    "cost. Keys that begin with `gw_test_` are answered by a built-in sandbox, free of charge.\n\n"
    "All that is listed here under `/v1` is served under `/api/v1` as well. Errors there have OpenRouter's "
    "form (`OpenRouterErrorBody`): `code` is the status, and our own code is `metadata.error_type`."
)
ASSETS = "/docs/assets"


def _describe_errors(schema: dict[str, Any]) -> None:
    """A wrong input is answered with 400 and our envelope, not with the framework's 422; a body that is too
    large with 413, everywhere.
    """
    for operations in schema["paths"].values():
        for operation in operations.values():
            _describe_refused_bodies(operation)
    known = schema["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        known.pop(name, None)
    described = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
    known |= {**described.pop("$defs"), "ErrorBody": described, "OpenRouterErrorBody": OPENROUTER_ERROR}


def _describe_refused_bodies(operation: dict[str, Any]) -> None:
    error = {"application/json": ERROR_SCHEMA}
    responses = operation["responses"]
    if responses.pop("422", None) is not None:
        responses["400"] = {"description": ERRORS["400"], "content": error}
    if "requestBody" in operation:
        responses.setdefault("413", {"description": ERRORS["413"], "content": error})


def add_documentation_page(app: FastAPI) -> None:
    """/docs without a CDN: the browser gets the page's scripts and styles from here."""
    app.mount(ASSETS, StaticFiles(directory=_assets()), name="documentation assets")

    @app.get("/docs", include_in_schema=False)
    async def read_documentation() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url=app.openapi_url or "/openapi.json",
            title=app.title,
            swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{ASSETS}/favicon.png",
        )


def _assets() -> Path:
    """A folder of the package fastapi-offline, which is found without being imported."""
    spec = find_spec("fastapi_offline")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("fastapi-offline is not installed; requirements.txt lists it")
    return Path(spec.origin).parent / "static"


def document_proxy(app: FastAPI) -> None:
    """Adds the proxy's endpoints to the application's OpenAPI."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            schema["paths"] |= {f"/v1/{name}": {"post": operation} for name, operation in OPERATIONS.items()}
            _describe_errors(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
