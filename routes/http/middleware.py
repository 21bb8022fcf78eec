"""Request id, body limit, log line. It gets an id, a bounded body and a line in the log."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import BodyTooLarge
from common.request_ids import new_request_id
from gateway.billing.rate_limit_headers import limit_headers
from routes.http.error_shapes import error_reply

log = structlog.get_logger("http")

MAX_ORDER_BYTES = 512 * 1024
PROXIED = ("/v1/", "/api/v1/")
# What a browser lets the page read of an answer, beside the headers that every page may read.
EXPOSED_HEADERS = [
    "x-request-id",
    "x-generation-id",
    "x-gateway-mode",
    "x-gateway-cost",
    "x-gateway-balance",
    "x-gateway-max-tokens",
    "x-gateway-settlement",
    "x-gateway-cache",
    "x-openrouter-cache-status",
    "x-gateway-byok",
    "idempotent-replayed",
    "age",
    *(
        f"x-ratelimit-{part}-{unit}"
        for part in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "Content-Disposition",
]


class Application(FastAPI):
    """FastAPI with something in front of all its layers, the outermost included: proxied requests pass none
    of them.
    """

    front: Callable[[ASGIApp], ASGIApp] | None = None

    def build_middleware_stack(self) -> ASGIApp:
        inner = super().build_middleware_stack()
        return inner if self.front is None else self.front(inner)


class RequestLog:
    """Gives each request its id, answers with it, and logs how it went. Plain ASGI: it is on the way of every
    streamed event.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, cors: Callable[[ASGIApp], ASGIApp]) -> None:
        self._app = app
        # What is answered here, a browser must be able to read as well.
        self._cors = cors
        self._max_body_bytes = max_body_bytes
        self._log = log.bind()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        request_id = state["request_id"] = new_request_id()
        header = (b"x-request-id", request_id.encode())
        status = 0
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = _with_limits([*message.get("headers", ()), header], state)
            await send(message)

        try:
            await self._serve(scope, receive, send_with_id)
        finally:
            self._log.info(
                "request",
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round((time.perf_counter() - started) * 1000, 1),
                **state.get("log", {}),
            )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Orders of the management API are short, and are parsed before anybody knows who sent them.
        limit = (
            self._max_body_bytes
            if scope["path"].startswith(PROXIED)
            else min(self._max_body_bytes, MAX_ORDER_BYTES)
        )
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > limit):
            reply = error_reply(_too_large(limit), scope["state"]["request_id"], scope["path"])
            await self._cors(reply)(scope, receive, send)
            return
        await self._app(scope, _bounded(receive, limit), send)


def _with_limits(
    headers: list[tuple[bytes, bytes]], state: MutableMapping[str, Any]
) -> list[tuple[bytes, bytes]]:
    """Management answers to a user's key say what is left of its limits; proxied ones and refusals say it
    themselves.
    """
    if "limits" in state and not any(name.startswith(b"x-ratelimit-") for name, _ in headers):
        headers += [
            (name.lower().encode(), value.encode()) for name, value in limit_headers(state["limits"]).items()
        ]
    return headers


def _bounded(receive: Receive, limit: int) -> Receive:
    """A body without a length is counted as it arrives."""
    left = limit

    async def bounded() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise _too_large(limit)
        return message

    return bounded


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit} bytes, the limit here.")
