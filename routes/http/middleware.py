"""What every request gets, on every path: an id, a bounded body, and a line in the log."""

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

MAX_MANAGEMENT_BYTES = 512 * 1024
State = MutableMapping[str, Any]
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
    """FastAPI with something in front of all its layers, even the outermost: proxied requests pass none of
    them.
    """

    front: Callable[[ASGIApp], ASGIApp] | None = None

    def build_middleware_stack(self) -> ASGIApp:
        inner = super().build_middleware_stack()
        return inner if self.front is None else self.front(inner)


class RequestLog:
    """Gives each request its id, answers with it, and logs how it went. Plain ASGI, because every event of a
    stream passes through it.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, cors: Callable[[ASGIApp], ASGIApp]) -> None:
        self._app = app
        # A browser must be able to read what is answered here, too.
        self._cors = cors
        self._max_body_bytes = max_body_bytes
        self._log = log.bind()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: State = scope.setdefault("state", {})
        state["request_id"] = new_request_id()
        identified = IdentifiedSend(send, state)
        started = time.perf_counter()
        try:
            await self._serve(scope, receive, identified)
        finally:
            self._log.info(
                "request",
                request_id=state["request_id"],
                method=scope["method"],
                path=scope["path"],
                status=identified.status,
                ms=round((time.perf_counter() - started) * 1000, 1),
                **state.get("log", {}),
            )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._body_limit(scope["path"])
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        # Eighteen digits are more than any limit, and int() of thousands of them would take its time.
        if length.isdigit() and (len(length) > 18 or int(length) > limit):
            reply = error_reply(_too_large(limit), scope["state"]["request_id"], scope["path"])
            await self._cors(reply)(scope, receive, send)
            return
        await self._app(scope, _bounded(receive, limit), send)

    def _body_limit(self, path: str) -> int:
        """Bytes. Bodies of the management API are short, and are parsed before the key is checked."""
        proxied = path.startswith(PROXIED)
        return self._max_body_bytes if proxied else min(self._max_body_bytes, MAX_MANAGEMENT_BYTES)


class IdentifiedSend:
    """Sends a response with its request id and what is left of the limits; remembers the status."""

    def __init__(self, send: Send, state: State) -> None:
        self.status = 0
        self._send = send
        self._state = state

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            header = (b"x-request-id", self._state["request_id"].encode())
            message["headers"] = _with_limits([*message.get("headers", ()), header], self._state)
        await self._send(message)


def _with_limits(headers: list[tuple[bytes, bytes]], state: State) -> list[tuple[bytes, bytes]]:
    """Adds what is left of a key's limits to responses of the management API. Proxied responses and refusals
    have these headers already.
    """
    if "limits" in state and not any(name.startswith(b"x-ratelimit-") for name, _ in headers):
        headers += [
            (name.lower().encode(), value.encode()) for name, value in limit_headers(state["limits"]).items()
        ]
    return headers


def _bounded(receive: Receive, limit: int) -> Receive:
    """Counts a body as it arrives: it may have no length, or a wrong one."""
    allowed = limit

    async def bounded() -> Message:
        nonlocal allowed
        message = await receive()
        allowed -= len(message.get("body", b""))
        if allowed < 0:
            raise _too_large(limit)
        return message

    return bounded


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit} bytes, the limit here.")
