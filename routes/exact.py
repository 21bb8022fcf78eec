"""How is a body read? As JSON whatever it says it is, amounts as exact decimals: a float loses digits before validation."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from usage import parse_json


class ExactRequest(Request):
    """A request whose JSON has decimals instead of floats."""

    async def json(self) -> Any:
        return parse_json(await self.body())


class ExactRoute(APIRoute):
    """A route that reads its body exactly, and as JSON without being told so: `curl -d` says it sends a form."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"strict_content_type": False})

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(ExactRequest(request.scope, request.receive))

        return handle
