"""How are amounts read from JSON? As exact decimals: a float would have lost digits before anybody validated it."""

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
    """A route that reads its body exactly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(ExactRequest(request.scope, request.receive))

        return handle
