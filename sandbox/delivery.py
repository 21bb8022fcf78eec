"""Pacing, silence, cuts, and the bill. Pacing, silence, cuts, odd bodies, and the bill at every ending."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from .endpoints.dialect import EVENT_STREAM, STREAM_ERRORS, Dialect, Frame, pad
from .planning import Plan
from .state import Call, State
from .wire import Connection, dumps

COMMENT = b": OPENROUTER PROCESSING\n\n"
COMMENT_AS_DATA = b"data: : OPENROUTER PROCESSING\n\n"
COMMENT_INTERVAL = 10.0
BREATH = 64
"""Events after which a fast stream lets others run, and notices a client that left."""
ELSEWHERE = "https://elsewhere.invalid/api/v1/chat/completions"
_HTML = b"<!DOCTYPE html><html><head><title>Just a moment...</title></head><body>Checking your browser.</body></html>"
_JSON, _TEXT, _PAGE = "application/json", "text/plain; charset=utf-8", "text/html; charset=UTF-8"


async def deliver(connection: Connection, state: State, call: Call, plan: Plan, dialect: Dialect) -> None:
    """Answer with the plan, streamed or whole; it is billed however that ends."""
    state.begin(call, plan.id)
    if (plan.generation.streamed or dialect.only_streams) and not plan.behaviour.body:
        await _deliver_stream(connection, state, call, plan, dialect)
    else:
        await _deliver_whole(connection, state, call, plan, dialect)


async def _deliver_whole(
    connection: Connection, state: State, call: Call, plan: Plan, dialect: Dialect
) -> None:
    """Send a whole body; a client that leaves is billed in full."""
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
    if not (behaviour.halt or behaviour.piece):
        await _send_whole(connection, call, plan, body, media_type)
        return
    call.status = 200
    await connection.start(
        200, {"content-type": media_type, **_headers(plan)}, compressed=behaviour.compressed
    )
    if behaviour.halt:
        await connection.write(body[: len(body) // 2])
        if behaviour.halt == "middle":
            await connection.hang()
        return
    await _write(connection, body, behaviour.piece)
    await connection.finish()


async def _send_whole(connection: Connection, call: Call, plan: Plan, body: bytes, media_type: str) -> None:
    headers, call.status = {"content-type": media_type, **_headers(plan)}, 200
    if plan.behaviour.body == "redirect":
        headers["location"], call.status = ELSEWHERE, 302
    await connection.answer(call.status, body, headers, compressed=plan.behaviour.compressed)


def _body(plan: Plan, dialect: Dialect) -> tuple[bytes, str]:
    form = plan.behaviour.body
    if form in ("html", "redirect"):
        return (_HTML, _PAGE) if form == "html" else (b"", _JSON)
    if form == "error":
        return dumps(dialect.render_error(STREAM_ERRORS["code"])), _JSON
    whole = dialect.render(plan)
    if isinstance(whole, str):
        return whole.encode(), _TEXT
    return _render_json(plan, dialect, whole), _JSON


def _render_json(plan: Plan, dialect: Dialect, whole: Mapping[str, object]) -> bytes:
    if plan.behaviour.body == "error-choices":
        return dumps({**whole, **dialect.render_error(STREAM_ERRORS["code"])})
    body = dumps(whole)
    return (
        body[: len(body) * 2 // 3]
        if plan.behaviour.body == "invalid"
        else b" " * plan.behaviour.padding + body
    )


async def _deliver_stream(
    connection: Connection, state: State, call: Call, plan: Plan, dialect: Dialect
) -> None:
    progress = _Progress()
    outcome = None
    try:
        with connection.watching():
            await _stream(connection, call, plan, dialect, progress)
        outcome = plan.generation
    finally:
        state.end(call, outcome or plan.cancelled(progress.tokens))


class _Progress:
    tokens = 0


async def _stream(
    connection: Connection, call: Call, plan: Plan, dialect: Dialect, progress: _Progress
) -> None:
    behaviour = plan.behaviour
    if behaviour.halt == "start":
        await connection.hang()
    call.status = 200
    headers = {"content-type": dialect.stream_type, "cache-control": "no-cache", **_headers(plan)}
    connection.farewell = dialect.farewell
    await connection.start(200, headers, compressed=behaviour.compressed)
    in_events = dialect.stream_type == EVENT_STREAM
    comment = (COMMENT_AS_DATA if behaviour.comments_as_data else COMMENT) if in_events else b""
    comment, wrap = comment.replace(b"\n", behaviour.line_end), in_events and behaviour.line_end != b"\n"
    if comment:
        await _write(connection, comment * behaviour.comments[0], behaviour.piece)
    await _wait_for_first_token(connection, behaviour.delay, comment)
    frames = pad(dialect.frames(plan), behaviour.padding)
    events = list(frames) if behaviour.halt else frames
    for place, frame in enumerate(events):
        if isinstance(events, list) and place == min(behaviour.after, len(events) - 1):
            await _halt(connection, behaviour.halt, frame)
            return
        if place and comment and behaviour.comments[1]:
            await _write(connection, comment * behaviour.comments[1], behaviour.piece)
        if behaviour.pace:
            await connection.pause(behaviour.pace)
        elif place % BREATH == BREATH - 1:
            await asyncio.sleep(0)
        data = frame.data.replace(b"\n", behaviour.line_end) if wrap else frame.data
        await _write(connection, data, behaviour.piece)
        progress.tokens = frame.tokens
    await connection.finish()


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
