"""The simulator as one raw ASGI app: routes, keys, limits, and what tests may look at.

Paths are OpenRouter's, with or without the prefix `/api/v1` (or `/v1`). Those under `/sandbox` are the
simulator's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation

import orjson

from sandbox.endpoints.chat_stream import plan_chat, plan_text
from sandbox.endpoints.dialect import TOO_LATE, Dialect
from sandbox.endpoints.embeddings import plan_embeddings
from sandbox.endpoints.images import plan_images
from sandbox.endpoints.messages import plan_message
from sandbox.endpoints.rerank import plan_rerank
from sandbox.endpoints.responses import plan_response
from sandbox.endpoints.speech import plan_speech
from sandbox.endpoints.transcriptions import plan_transcription, read_upload
from sandbox.models.catalog import list_models, render_endpoints, render_model
from sandbox.models.entry import Model
from sandbox.models.text_models import BY_ID

from .delivery import deliver
from .failures import Failure, Refusal, anthropic_body, invalid_request, refusal
from .generation import render_generation
from .multipart import read_form
from .planning import Body, Limits, Plan, RequestSettings, failed_id
from .scenarios import parse_scenarios
from .state import Call, State
from .wire import BodyTooLarge, ClientGone, Connection, Receive, Scope, Send, dumps, plain

SCENARIO_HEADER = "x-sandbox-scenario"
_PREFIXES = ("/api/v1", "/v1")
_TOO_LATE = Failure("504, over the time limit", 504, TOO_LATE)

_Handler = Callable[[Connection, Call], Awaitable[None]]
_Planner = Callable[[Body, RequestSettings], tuple[Plan, Dialect]]

ENDPOINTS: Mapping[str, _Planner] = {
    "/chat/completions": plan_chat,
    "/completions": plan_text,
    "/responses": plan_response,
    "/messages": plan_message,
    "/embeddings": plan_embeddings,
    "/rerank": plan_rerank,
    "/images": plan_images,
    "/audio/speech": plan_speech,
    "/audio/transcriptions": plan_transcription,
}


class Sandbox:
    """The simulator: an ASGI app and its memory."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.state = State()
        self._handlers: Mapping[tuple[str, str], _Handler] = {
            **{("POST", path): self._inference(planner) for path, planner in ENDPOINTS.items()},
            ("GET", "/generation"): self._generation,
            ("GET", "/key"): self._key,
            ("GET", "/credits"): self._credits,
            ("GET", "/models"): self._models,
            ("GET", "/embeddings/models"): self._embedding_models,
            ("GET", "/sandbox/bill"): self._bill,
            ("DELETE", "/sandbox/bill"): self._new_bill,
            ("PUT", "/sandbox/prices"): self._set_prices,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _run_lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        # Whatever a client that has left misses, nobody else can use it.
        with suppress(ClientGone):
            await self._answer_in_time(Connection(scope, receive, send))

    async def _answer_in_time(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(self.limits.seconds):
                await self._answer(connection)
        except TimeoutError:
            await _end_late(connection)

    async def _answer(self, connection: Connection) -> None:
        path = _strip_prefix(connection.path)
        if path == "/sandbox/calls":
            await self._calls(connection)
            return
        handler = self._find_handler(connection.method, path)
        call = self.state.open_call(connection, path if handler else "(unknown)")
        try:
            if handler is None:
                raise refusal(404, f"Not found: {connection.method} {connection.path}")
            await handler(connection, call)
        except BodyTooLarge:
            await self._refuse(connection, call, refusal(413, "Payload too large").failure)
        except Refusal as exc:
            await self._refuse(connection, call, exc.failure)

    async def _refuse(self, connection: Connection, call: Call, failure: Failure) -> None:
        call.status, headers = failure.status, dict(failure.headers)
        # A refused generation has an id, too, and `/generation` says that it cost nothing.
        generation_id = failed_id(call.body) if isinstance(call.body, dict) else None
        if generation_id:
            headers["x-generation-id"] = generation_id
        body = _error_body(connection.path, failure, generation_id)
        await connection.respond(failure.status, dumps(body), headers)

    def _inference(self, planner: _Planner) -> _Handler:
        """The handler of an endpoint that generates: it reads, plans and delivers."""

        async def handler(connection: Connection, call: Call) -> None:
            body, changes = await self._read(connection, call)
            plan, dialect = planner(body, RequestSettings(changes, self.limits, self.state.market))
            await deliver(connection, self.state, call, plan, dialect)

        return handler

    async def _read(
        self, connection: Connection, call: Call
    ) -> tuple[Mapping[str, object], dict[str, object]]:
        """The parsed body and the scenario's changes. The key is checked first."""
        _require_key(connection)
        raw = await connection.read_body()
        call.keep_body(raw)
        content_type = connection.header("content-type")
        is_upload = call.path == "/audio/transcriptions" and content_type.startswith("multipart/form-data")
        body = read_upload(read_form(content_type, raw)) if is_upload else _read_json(raw)
        return body, parse_scenarios(connection.header(SCENARIO_HEADER))

    async def _generation(self, connection: Connection, call: Call) -> None:
        _require_key(connection)
        generation_id = connection.query.get("id", "")
        generation = self.state.find(generation_id)
        if generation is None:
            raise refusal(404, f"Generation {generation_id} not found")
        await _ok(connection, call, {"data": render_generation(generation_id, generation)})

    async def _key(self, connection: Connection, call: Call) -> None:
        _require_key(connection)
        await _ok(connection, call, {"data": self.state.bill.render_key(datetime.now(UTC))})

    async def _credits(self, connection: Connection, call: Call) -> None:
        _require_key(connection)
        await _ok(connection, call, {"data": self.state.bill.render_credits()})

    async def _models(self, connection: Connection, call: Call) -> None:
        await _ok(connection, call, {"data": list_models(connection.query, self.state.market.factor_of)})

    async def _embedding_models(self, connection: Connection, call: Call) -> None:
        query = {**connection.query, "output_modalities": "embeddings"}
        await _ok(connection, call, {"data": list_models(query, self.state.market.factor_of)})

    def _find_handler(self, method: str, path: str) -> _Handler | None:
        handler = self._handlers.get((method, path))
        return self._find_model_handler(path) if handler is None and method == "GET" else handler

    def _find_model_handler(self, path: str) -> _Handler | None:
        """`/model/{author}/{slug}` and `/models/{author}/{slug}/endpoints`."""
        if path.startswith("/models/") and path.endswith("/endpoints"):
            return self._show(path.removeprefix("/models/").removesuffix("/endpoints"), render_endpoints)
        if path.startswith("/model/"):
            return self._show(path.removeprefix("/model/"), render_model)
        return None

    def _show(self, model_id: str, view: Callable[[Model, Decimal], dict[str, object]]) -> _Handler:
        async def handler(connection: Connection, call: Call) -> None:
            model = BY_ID.get(model_id)
            if model is None:
                raise refusal(404, f"Model {model_id} not found", error_type="not_found")
            await _ok(connection, call, {"data": view(model, self.state.market.factor_of(model_id))})

        return handler

    async def _bill(self, connection: Connection, call: Call) -> None:
        await _ok(connection, call, self.state.bill.render(len(self.state.in_flight)))

    async def _new_bill(self, connection: Connection, call: Call) -> None:
        self.state.billed = Decimal(0)
        await self._bill(connection, call)

    async def _calls(self, connection: Connection) -> None:
        """The calls so far, for tests to look at. This request is not one of them."""
        if connection.method == "DELETE":
            self.state.reset()
        await connection.respond(200, dumps(self.state.render()))

    async def _set_prices(self, connection: Connection, call: Call) -> None:
        """Changes all prices from now on, as providers do: `{"factor": "2"}`."""
        try:
            factor = Decimal(str(orjson.loads(await connection.read_body())["factor"]))
        except (orjson.JSONDecodeError, InvalidOperation, KeyError, TypeError):
            factor = Decimal(-1)
        if not factor.is_finite() or factor < 0:
            raise invalid_request('Expected {"factor": "2"}')
        self.state.market.factor = factor
        await _ok(connection, call, {"factor": plain(factor)})


def create_app(*, max_answer_bytes: int | None = None, max_seconds: float | None = None) -> Sandbox:
    """A simulator with a memory of its own. The limits keep responses small for users who pay nothing."""
    return Sandbox(Limits(max_answer_bytes, max_seconds))


async def _ok(connection: Connection, call: Call, body: dict[str, object]) -> None:
    call.status = 200
    await connection.respond(200, dumps(body))


def _read_json(raw: bytes) -> Mapping[str, object]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise invalid_request("Invalid JSON in the request body") from None
    if not isinstance(body, dict):
        raise invalid_request("The request body must be an object")
    return body


def _require_key(connection: Connection) -> None:
    # Any key will do. Anthropic's clients send theirs as x-api-key.
    scheme, _, key = connection.header("authorization").partition(" ")
    if (scheme.lower() != "bearer" or not key.strip()) and not connection.header("x-api-key"):
        raise refusal(401, "Missing Authentication header")


def _strip_prefix(path: str) -> str:
    for prefix in _PREFIXES:
        if path.startswith(f"{prefix}/"):
            return path[len(prefix) :]
    return path


def _error_body(path: str, failure: Failure, generation_id: str | None) -> Mapping[str, object]:
    return anthropic_body(failure, generation_id) if _strip_prefix(path) == "/messages" else failure.body


async def _end_late(connection: Connection) -> None:
    """Ends a response that took too long. A body that has begun is dropped unless it streams events."""
    if not connection.started:
        await connection.respond(504, dumps(_error_body(connection.path, _TOO_LATE, None)))
    elif connection.farewell and not connection.finished:
        await connection.write(connection.farewell)
        await connection.finish()


async def _run_lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
