"""Sends a planned response, with the scenario's pauses, silences, cuts and odd bodies. It is billed on every
ending.

https://openrouter.ai/docs/api-reference/streaming describes the comments, the errors in mid-stream, and what
happens when a client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

from sandbox.endpoints.dialect import EVENT_STREAM, STREAM_ERRORS, Dialect, Frame, pad

from .planning import Plan
from .state import Call, State
from .wire import Connection, dumps

# OpenRouter sends comments so that a connection does not time out before the first token.
COMMENT = b": OPENROUTER PROCESSING\n\n"
COMMENT_AS_DATA = b"data: : OPENROUTER PROCESSING\n\n"
COMMENT_INTERVAL = 10.0
BREATH = 64
"""The number of events after which a fast stream lets other tasks run, and notices a client that has left."""
ELSEWHERE = "https://elsewhere.invalid/api/v1/chat/completions"
_HTML = (
    b"<!DOCTYPE html><html><head><title>Just a moment...</title></head>"
    b"<body>Checking your browser.</body></html>"
)
_JSON, _TEXT, _PAGE = "application/json", "text/plain; charset=utf-8", "text/html; charset=UTF-8"


async def deliver(connection: Connection, state: State, call: Call, plan: Plan, dialect: Dialect) -> None:
    """Sends the planned response, streamed or whole. It is billed however that ends."""
    state.begin(call, plan.id)
    if (plan.generation.streamed or dialect.only_streams) and not plan.behaviour.body:
        await _deliver_stream(connection, state, call, plan, dialect)
    else:
        await _deliver_whole(connection, state, call, plan, dialect)


async def _deliver_whole(
    connection: Connection, state: State, call: Call, plan: Plan, dialect: Dialect
) -> None:
    """Sends a whole body. A client that leaves is billed in full: only a stream can be cancelled."""
    behaviour = plan.behaviour
    body, media_type = _body(plan, dialect)
    try:
        if behaviour.delay or behaviour.halt or behaviour.piece:
            with connection.watching():
                await _send_with_faults(connection, call, plan, body, media_type)
        else:
            await _send_whole(connection, call, plan, body, media_type)
    finally:
        state.end(call, plan.generation)


async def _send_with_faults(
    connection: Connection, call: Call, plan: Plan, body: bytes, media_type: str
) -> None:
    behaviour = plan.behaviour
    if behaviour.delay:
        await connection.pause(behaviour.delay)
    if behaviour.halt == "start":
        await connection.hang()
    if behaviour.halt or behaviour.piece:
        await _send_in_pieces(connection, call, plan, body, media_type)
    else:
        await _send_whole(connection, call, plan, body, media_type)


async def _send_in_pieces(
    connection: Connection, call: Call, plan: Plan, body: bytes, media_type: str
) -> None:
    behaviour, call.status = plan.behaviour, 200
    headers = {"content-type": media_type, **_headers(plan)}
    await connection.start(200, headers, compressed=behaviour.compressed)
    if not behaviour.halt:
        await _write(connection, body, behaviour.piece)
        await connection.finish()
        return
    await connection.write(body[: len(body) // 2])
    if behaviour.halt == "middle":
        await connection.hang()
    # Otherwise the response is left unfinished, which makes the server drop the connection.


async def _send_whole(connection: Connection, call: Call, plan: Plan, body: bytes, media_type: str) -> None:
    headers, call.status = {"content-type": media_type, **_headers(plan)}, 200
    if plan.behaviour.body == "redirect":
        headers["location"], call.status = ELSEWHERE, 302
    await connection.respond(call.status, body, headers, compressed=plan.behaviour.compressed)


def _body(plan: Plan, dialect: Dialect) -> tuple[bytes, str]:
    """The body that the scenario wants, and its media type."""
    form = plan.behaviour.body
    if form in ("html", "redirect"):
        return (_HTML, _PAGE) if form == "html" else (b"", _JSON)
    if form == "error":
        return dumps(dialect.render_error(STREAM_ERRORS["code"])), _JSON
    rendered = dialect.render(plan)
    if isinstance(rendered, str):
        return rendered.encode(), _TEXT
    return _render_json(plan, dialect, rendered), _JSON


def _render_json(plan: Plan, dialect: Dialect, rendered: Mapping[str, object]) -> bytes:
    if plan.behaviour.body == "error-choices":
        return dumps({**rendered, **dialect.render_error(STREAM_ERRORS["code"])})
    body = dumps(rendered)
    if plan.behaviour.body == "invalid":
        return body[: len(body) * 2 // 3]
    # Spaces before a JSON value are part of no value, so that the padding changes the size alone.
    return b" " * plan.behaviour.padding + body


async def _deliver_stream(
    connection: Connection, state: State, call: Call, plan: Plan, dialect: Dialect
) -> None:
    stream = _Stream(connection, plan, dialect)
    generation = None
    try:
        with connection.watching():
            await stream.send(call)
        generation = plan.generation
    finally:
        # Whatever has ended the stream early, the tokens that were sent are billed.
        state.end(call, generation or plan.cancelled(stream.tokens))


class _Stream:
    """One streamed response, and the tokens of it that were sent so far."""

    def __init__(self, connection: Connection, plan: Plan, dialect: Dialect) -> None:
        self.tokens = 0
        self._connection = connection
        self._plan = plan
        self._dialect = dialect
        # Sounds are streamed as plain bytes: comments and line ends belong to event streams alone.
        self._has_events = dialect.stream_type == EVENT_STREAM
        self._comment = _comment(plan) if self._has_events else b""

    async def send(self, call: Call) -> None:
        behaviour = self._plan.behaviour
        if behaviour.halt == "start":
            await self._connection.hang()
        call.status = 200
        await self._start()
        if self._comment:
            await self._write(self._comment * behaviour.comments[0])
        await _wait_for_first_token(self._connection, behaviour.delay, self._comment)
        frames = pad(self._dialect.frames(self._plan), behaviour.padding)
        if behaviour.halt:
            await self._send_until_halt(list(frames))
        else:
            await self._send_frames(frames)
            await self._connection.finish()

    async def _start(self) -> None:
        connection, plan = self._connection, self._plan
        content_type = self._dialect.stream_type
        headers = {"content-type": content_type, "cache-control": "no-cache", **_headers(plan)}
        connection.farewell = self._dialect.farewell
        await connection.start(200, headers, compressed=plan.behaviour.compressed)

    async def _send_until_halt(self, frames: list[Frame]) -> None:
        # A short answer halts at its last event: the scenario must never let it end well.
        position = min(self._plan.behaviour.after, len(frames) - 1)
        await self._send_frames(iter(frames[:position]))
        await _halt(self._connection, self._plan.behaviour.halt, frames[position])

    async def _send_frames(self, frames: Iterator[Frame]) -> None:
        for position, frame in enumerate(frames):
            await self._pace(position)
            await self._write(self._with_line_ends(frame.data))
            # Counted after it was sent: a client is not billed for a token that did not leave us.
            self.tokens = frame.tokens

    async def _pace(self, position: int) -> None:
        """What comes between two events: comments, a pause, or at least a chance for others to run."""
        behaviour = self._plan.behaviour
        if position and self._comment and behaviour.comments[1]:
            await self._write(self._comment * behaviour.comments[1])
        if behaviour.pace:
            await self._connection.pause(behaviour.pace)
        elif position % BREATH == BREATH - 1:
            await asyncio.sleep(0)

    def _with_line_ends(self, data: bytes) -> bytes:
        # Most streams keep their line ends, and need not be searched for any.
        line_end = self._plan.behaviour.line_end
        return data.replace(b"\n", line_end) if self._has_events and line_end != b"\n" else data

    async def _write(self, data: bytes) -> None:
        await _write(self._connection, data, self._plan.behaviour.piece)


def _comment(plan: Plan) -> bytes:
    comment = COMMENT_AS_DATA if plan.behaviour.comments_as_data else COMMENT
    return comment.replace(b"\n", plan.behaviour.line_end)


async def _wait_for_first_token(connection: Connection, seconds: float, comment: bytes) -> None:
    while seconds > 0:
        await connection.pause(min(seconds, COMMENT_INTERVAL))
        seconds -= COMMENT_INTERVAL
        if seconds > 0 and comment:
            await connection.write(comment)


async def _halt(connection: Connection, where: str, frame: Frame) -> None:
    if where == "middle":
        await connection.hang()
    await connection.write(frame.data[: len(frame.data) // 2])


async def _write(connection: Connection, data: bytes, piece: int) -> None:
    if not piece:
        await connection.write(data)
        return
    for start in range(0, len(data), piece):
        await connection.write(data[start : start + piece])
        await asyncio.sleep(0)


def _headers(plan: Plan) -> dict[str, str]:
    headers = {"x-generation-id": plan.id} if plan.behaviour.generation_header else {}
    if plan.behaviour.cache == "hit":
        headers |= {
            "x-openrouter-cache-status": "HIT",
            "x-openrouter-cache-age": "17",
            "x-openrouter-cache-ttl": "300",
            "x-openrouter-cache-source-id": plan.id,
        }
    return headers
