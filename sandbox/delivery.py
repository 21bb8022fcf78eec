"""How does a planned answer reach the client? Pacing, silence, cuts, odd bodies, and the bill at every ending."""

from __future__ import annotations

import asyncio

from .dialects import Dialect, render_whole
from .planning import Plan
from .state import Call, State
from .streaming import COMMENT, COMMENT_AS_DATA, ERRORS, Frame, frames
from .wire import Connection, dumps

COMMENT_INTERVAL = 10.0
BREATH = 64
"""Events after which a fast stream lets others run, and notices a client that left."""
ELSEWHERE = "https://elsewhere.invalid/api/v1/chat/completions"
_HTML = b"<!DOCTYPE html><html><head><title>Just a moment...</title></head><body>Checking your browser.</body></html>"


async def deliver(connection: Connection, state: State, call: Call, plan: Plan, dialect: Dialect) -> None:
    """Answer with the plan, streamed or whole; it is billed however that ends."""
    state.begin(call, plan.id)
    if plan.generation.streamed and not plan.behaviour.body:
        await _deliver_stream(connection, state, call, plan, dialect)
    else:
        await deliver_whole(connection, state, call, plan, _body(plan, dialect))


async def deliver_whole(connection: Connection, state: State, call: Call, plan: Plan, body: bytes) -> None:
    """Send a whole body; a client that leaves is billed in full."""
    behaviour = plan.behaviour
    try:
        if behaviour.delay or behaviour.halt or behaviour.piece:
            with connection.watching():
                await _send_with_faults(connection, call, plan, body)
        else:
            await _send_whole(connection, call, plan, body)
    finally:
        state.end(call, plan.generation)


async def _send_with_faults(connection: Connection, call: Call, plan: Plan, body: bytes) -> None:
    behaviour = plan.behaviour
    if behaviour.delay:
        await connection.pause(behaviour.delay)
    if behaviour.halt == "start":
        await connection.hang()
    if not (behaviour.halt or behaviour.piece):
        await _send_whole(connection, call, plan, body)
        return
    call.status = 200
    await connection.start(200, {"content-type": "application/json", **_headers(plan)}, compressed=behaviour.compressed)
    if behaviour.halt:
        await connection.write(body[: len(body) // 2])
        if behaviour.halt == "middle":
            await connection.hang()
        return
    await _write(connection, body, behaviour.piece)
    await connection.finish()


async def _send_whole(connection: Connection, call: Call, plan: Plan, body: bytes) -> None:
    headers, call.status = _headers(plan), 200
    if plan.behaviour.body == "html":
        headers["content-type"] = "text/html; charset=UTF-8"
    elif plan.behaviour.body == "redirect":
        headers["location"], call.status = ELSEWHERE, 302
    await connection.answer(call.status, body, headers, compressed=plan.behaviour.compressed)


def _body(plan: Plan, dialect: Dialect) -> bytes:
    form = plan.behaviour.body
    if form == "html":
        return _HTML
    if form == "redirect":
        return b""
    whole = render_whole(plan, dialect)
    if form in ("error", "error-choices"):
        error = {"error": ERRORS["code"]}
        return dumps(error if form == "error" else {**whole, **error})
    body = dumps(whole)
    return body[: len(body) * 2 // 3] if form == "invalid" else b" " * plan.behaviour.padding + body


async def _deliver_stream(connection: Connection, state: State, call: Call, plan: Plan, dialect: Dialect) -> None:
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


async def _stream(connection: Connection, call: Call, plan: Plan, dialect: Dialect, progress: _Progress) -> None:
    behaviour = plan.behaviour
    if behaviour.halt == "start":
        await connection.hang()
    call.status = 200
    headers = {"content-type": "text/event-stream", "cache-control": "no-cache", **_headers(plan)}
    await connection.start(200, headers, compressed=behaviour.compressed)
    comment = (COMMENT_AS_DATA if behaviour.comments_as_data else COMMENT).replace(b"\n", behaviour.line_end)
    await _write(connection, comment * behaviour.comments[0], behaviour.piece)
    await _wait_for_first_token(connection, behaviour.delay, comment)
    events = list(frames(plan, dialect)) if behaviour.halt else frames(plan, dialect)
    for place, frame in enumerate(events):
        if isinstance(events, list) and place == min(behaviour.after, len(events) - 1):
            await _halt(connection, behaviour.halt, frame)
            return
        if place and behaviour.comments[1]:
            await _write(connection, comment * behaviour.comments[1], behaviour.piece)
        if behaviour.pace:
            await connection.pause(behaviour.pace)
        elif place % BREATH == BREATH - 1:
            await asyncio.sleep(0)
        data = frame.data if behaviour.line_end == b"\n" else frame.data.replace(b"\n", behaviour.line_end)
        await _write(connection, data, behaviour.piece)
        progress.tokens = frame.tokens
    await connection.finish()


async def _wait_for_first_token(connection: Connection, seconds: float, comment: bytes) -> None:
    while seconds > 0:
        await connection.pause(min(seconds, COMMENT_INTERVAL))
        seconds -= COMMENT_INTERVAL
        if seconds > 0:
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
