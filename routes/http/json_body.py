"""Request bodies of the management API, read as JSON whatever their content type, with exact decimals.

A float would have lost digits of an amount before validation sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Scope

from common.errors import BadRequest
from common.validation_messages import OBJECT
from gateway.upstream.usage import parse_json


class ExactRequest(Request):
    """A request whose JSON has decimals instead of floats."""

    async def json(self) -> Any:
        try:
            return parse_json(await self.body())
        except ValueError as error:
            raise BadRequest(
                f"The request body is not valid JSON ({error}). Send {OBJECT}.", code="invalid_json"
            ) from error


def _untyped(scope: Scope) -> Scope:
    """Without the content type: `curl -d` always claims to send a form, and the framework believes it."""
    return {
        **scope,
        "headers": [(name, value) for name, value in scope["headers"] if name != b"content-type"],
    }


class ExactRoute(APIRoute):
    """A route that reads its body exactly, and as JSON whatever its content type."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"strict_content_type": False})

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(ExactRequest(_untyped(request.scope), request.receive))

        return handle
