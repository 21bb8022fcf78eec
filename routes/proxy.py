"""Endpoints of the proxy: they read a body, start an exchange in a task of its own, and watch the client.

They are plain ASGI, because the framework's endpoints would cost as much as everything else together here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from fastapi import FastAPI, Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import BadRequest, GatewayError
from gateway.proxy.endpoints import ENDPOINTS, Endpoint
from gateway.proxy.exchange import Exchange
from gateway.proxy.request import IncomingRequest
from gateway.proxy.services import Services
from gateway.runtime.instance import Runtime
from routes.dependencies import read_credential, running
from routes.http.error_handlers import on_bug
from routes.http.error_shapes import error_reply
from security import Credential, printable_header


class ClientConnection:
    """The client at the other end of an ASGI connection; nothing is sent to one that has left."""

    def __init__(self, send: Send) -> None:
        self.gone = False
        self.started = False
        self._send = send

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started = True
        encoded = [
            (name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()
        ]
        await self._deliver({"type": "http.response.start", "status": status, "headers": encoded})

    async def send(self, data: bytes, *, more: bool) -> None:
        await self._deliver({"type": "http.response.body", "body": data, "more_body": more})

    async def _deliver(self, message: Message) -> None:
        if self.gone:
            return
        try:
            await self._send(message)
        except OSError:
            # The exchange goes on without its client: the answer that was paid for still has to be settled.
            self.gone = True


class ProxyEndpoint:
    """One billable endpoint of the upstream."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = ClientConnection(send)
        try:
            request = Request(scope, receive)
            runtime = await running(request)
            exchange = await self._open(runtime, request, client)
            if exchange is not None:
                task = runtime.start(exchange.run(), f"request {request.state.request_id}")
                await self._serve(exchange, task, receive, scope)
        except GatewayError as refusal:
            await _refuse(refusal, client, scope, receive, send)
        except Exception as bug:
            if not (client.started or client.gone):
                await (await on_bug(Request(scope), bug))(scope, receive, send)
            raise

    async def _open(self, runtime: Runtime, request: Request, client: ClientConnection) -> Exchange | None:
        """An exchange for this request, or None where the client left before its body was complete."""
        credential = read_credential(request, runtime)
        body = await _read_body(request, runtime.settings.deadline_seconds)
        if body is None:
            return None
        services = Services.for_environment(runtime, credential.environment)
        return Exchange(services, self._incoming(request, credential, body), client)

    def _incoming(self, request: Request, credential: Credential, body: bytes) -> IncomingRequest:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]
        }
        return IncomingRequest(
            endpoint=self.endpoint,
            credential=credential,
            body=body,
            request_id=request.state.request_id,
            content_type=headers.get("content-type", ""),
            client_request_id=printable_header(headers.get("x-request-id"), 256),
            scenario=headers.get("x-sandbox-scenario"),
            headers=headers,
        )

    async def _serve(
        self, exchange: Exchange, task: asyncio.Task[None], receive: Receive, scope: Scope
    ) -> None:
        watching = asyncio.create_task(_watch(receive, exchange, task))
        try:
            # A cancelled request must not cancel its exchange: what was sent upstream has to be settled.
            await asyncio.shield(task)
        except asyncio.CancelledError:
            exchange.client_left()  # the server shuts down, and has given up on its clients
            raise
        finally:
            watching.cancel()
            scope["state"]["log"] = _log_fields(exchange)


async def _refuse(
    refusal: GatewayError, client: ClientConnection, scope: Scope, receive: Receive, send: Send
) -> None:
    scope["state"].setdefault("log", {})["error_code"] = refusal.code
    if not client.gone:
        await error_reply(refusal, scope["state"]["request_id"], scope["path"])(scope, receive, send)
    # Error, traceback, frames and task refer to each other, and so keep the body in memory until the garbage
    # collector runs.
    refusal.__traceback__ = refusal.__context__ = refusal.__cause__ = None


async def _read_body(request: Request, seconds: float) -> bytes | None:
    """The whole body, or None where the client left before it was complete. Raises BadRequest where it takes
    longer than `seconds`.
    """
    try:
        async with asyncio.timeout(seconds):
            return await _collect(request)
    except TimeoutError:
        message = f"The request body has not arrived within {seconds:g} seconds."
        raise BadRequest(message, code="body_too_slow", headers={"connection": "close"}) from None


async def _collect(request: Request) -> bytes | None:
    parts: list[bytes] = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _watch(receive: Receive, exchange: Exchange, task: asyncio.Task[None]) -> None:
    """Tells the exchange when its client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not task.done():
        exchange.client_left()


def _log_fields(exchange: Exchange) -> dict[str, object]:
    fields: dict[str, object] = {"client_gone": exchange.client.gone or None}
    if exchange.replayed is not None:
        reply = exchange.replayed
        fields |= {"cost_nanos": reply.cost_nanos, "settlement": reply.source}
    if exchange.admitted is not None:
        hold, charge = exchange.admitted.request.hold, exchange.admitted.charging.charge
        outcome = exchange.admitted.forwarding.outcome
        fields |= {"user_id": hold.user_id, "key_id": hold.key_id, "hold_nanos": hold.hold_nanos}
        fields |= {"model": outcome.model, "error_code": outcome.failure and outcome.failure.code}
        if charge is not None:
            fields |= {"cost_nanos": charge["cost_nanos"], "settlement": charge["status"]}
    return {name: value for name, value in fields.items() if value is not None}


ROUTES = {path: ProxyEndpoint(endpoint.at(path)) for endpoint in ENDPOINTS for path in endpoint.all_paths}


class FastPath:
    """Takes proxied requests past the framework's layers, which cost a seventh of a request. Requests of
    browsers need CORS, so they pass through all layers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = (
            ROUTES.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        )
        if endpoint is None or any(name == b"origin" for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
        else:
            await endpoint(scope, receive, send)


def add_proxy_routes(app: FastAPI) -> None:
    """Puts the endpoints in front of the framework's routes."""
    for path, endpoint in ROUTES.items():
        app.router.routes.insert(0, Route(path, endpoint, methods=["POST"], include_in_schema=False))
