"""/messages. Anthropic's message and its events; its usage says what it cost, which the schema leaves open.

Shapes: https://docs.anthropic.com/en/docs/build-with-claude/streaming, OpenRouter's `MessagesResult` and
`MessagesStreamEvents`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import orjson

from sandbox.content import Choice
from sandbox.failures import anthropic_error
from sandbox.planning import Ask, Body, Plan, plan_completion

from .chat import FRAGMENT_TOKENS
from .dialect import PROVIDER_DIED, STREAM_ERRORS, TOO_LATE, Frame, Whole, sse
from .messages_input import read_message_request
from .usage import render_message_usage

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_EMPTY: Mapping[str, Mapping[str, object]] = {
    "thinking": {"thinking": "", "signature": ""},
    "tool_use": {"input": {}},
    "text": {"text": ""},
}
_MONEY = ("cost", "is_byok", "cost_details")


def answer_message(body: Body, ask: Ask) -> tuple[Plan, Messages]:
    """Plan a message; raises Refusal."""
    return plan_completion(read_message_request(body), ask), Messages()


class Messages(Whole):
    """`/messages`."""

    farewell = sse("error", {"type": "error", "error": anthropic_error(TOO_LATE, 504)})

    def render(self, plan: Plan) -> Mapping[str, object]:
        choice = plan.choices[0]
        usage = (
            {} if plan.behaviour.usage == "missing" else {"usage": render_message_usage(plan, plan.tokens)}
        )
        died = {"error": anthropic_error(PROVIDER_DIED, 502)} if choice.finish == "error" else {}
        return {
            **_message(plan),
            "content": [_block(kind, choice) for kind in _kinds(plan)],
            **_ending(choice),
            **usage,
            **died,
        }

    def render_error(self, error: Mapping[str, object]) -> Mapping[str, object]:
        return {"type": "error", "error": _error(error), "request_id": None}

    def frames(self, plan: Plan) -> Iterator[Frame]:
        failure, choice = plan.behaviour.stream_error, plan.choices[0]
        if failure and not plan.behaviour.after:
            yield _failed(STREAM_ERRORS[failure], 0)
            return
        yield _event("message_start", 0, message=_started(plan))
        tokens = 0
        for place, kind in enumerate(_kinds(plan)):
            for frame in _block_frames(plan, kind, place, tokens, cut=bool(failure)):
                tokens = frame.tokens
                yield frame
        if failure or choice.finish == "error":
            yield _failed(STREAM_ERRORS[failure] if failure else PROVIDER_DIED, tokens)
            return
        yield from _end(plan, choice)


def _message(plan: Plan) -> dict[str, object]:
    return {
        "id": f"msg_{plan.id[-24:]}",
        "type": "message",
        "role": "assistant",
        "model": plan.model.id,
        "provider": plan.route.endpoint.provider,
        "container": None,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _ending(choice: Choice) -> dict[str, object]:
    reason = "stop_sequence" if choice.stopped_by else _REASONS.get(choice.finish)
    return {"stop_reason": reason, "stop_sequence": choice.stopped_by}


def _started(plan: Plan) -> dict[str, object]:
    """The message of the first event: its usage counts one token out and says nothing of money."""
    if plan.behaviour.usage == "missing":
        return _message(plan)
    first = replace(plan.tokens, completion=min(1, plan.tokens.completion), reasoning=0)
    usage = {name: value for name, value in render_message_usage(plan, first).items() if name not in _MONEY}
    return {**_message(plan), "usage": usage}


def _kinds(plan: Plan) -> list[str]:
    """The content blocks: thinking, then text or a tool's use."""
    choice, kinds = plan.choices[0], []
    if choice.thoughts and plan.shows_thoughts:
        kinds.append("thinking")
    if choice.pieces or choice.tool:
        kinds.append("tool_use" if choice.tool else "text")
    return kinds


def _block(kind: str, choice: Choice) -> dict[str, object]:
    if kind == "thinking":
        return {"type": "thinking", "thinking": choice.thinking, "signature": _signature(choice)}
    if kind == "tool_use" and choice.tool:
        return {
            "type": "tool_use",
            "id": f"toolu_{choice.tool.id}",
            "name": choice.tool.name,
            "input": _input(choice.text),
        }
    return {"type": "text", "text": choice.text, "citations": None}


def _input(arguments: str) -> object:
    """The tool's input; an empty one where the token limit has cut the arguments."""
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}


def _signature(choice: Choice) -> str:
    return f"sandbox-{len(choice.thoughts)}"


def _block_frames(plan: Plan, kind: str, place: int, tokens: int, *, cut: bool) -> Iterator[Frame]:
    choice = plan.choices[0]
    tokens += choice.tool.lead if kind == "tool_use" and choice.tool else 0
    yield _event(
        "content_block_start", tokens, index=place, content_block={**_block(kind, choice), **_EMPTY[kind]}
    )
    if place == 0:
        yield _event("ping", tokens)
    tokens += 0 if plan.shows_thoughts else len(choice.thoughts)
    for delta, added in _deltas(kind, choice):
        tokens += added
        yield _event("content_block_delta", tokens, index=place, delta=delta)
    if not cut:
        yield _event("content_block_stop", tokens, index=place)


def _deltas(kind: str, choice: Choice) -> Iterator[tuple[dict[str, object], int]]:
    if kind == "text":
        for piece in choice.pieces:
            yield {"type": "text_delta", "text": piece}, 1
    elif kind == "thinking":
        for thought in choice.thoughts:
            yield {"type": "thinking_delta", "thinking": thought}, 1
        yield {"type": "signature_delta", "signature": _signature(choice)}, 0
    else:
        yield {"type": "input_json_delta", "partial_json": ""}, 0
        for start in range(0, len(choice.pieces), FRAGMENT_TOKENS):
            pieces = choice.pieces[start : start + FRAGMENT_TOKENS]
            yield {"type": "input_json_delta", "partial_json": "".join(pieces)}, len(pieces)


def _end(plan: Plan, choice: Choice) -> Iterator[Frame]:
    behaviour, tokens = plan.behaviour, plan.tokens.completion
    if behaviour.usage == "missing" and not behaviour.done:
        return
    usage = {} if behaviour.usage == "missing" else {"usage": render_message_usage(plan, plan.tokens)}
    for _ in range(2 if behaviour.usage == "twice" else 1):
        yield _event("message_delta", tokens, delta=_ending(choice), **usage)
    if behaviour.done:
        yield _event("message_stop", tokens)


def _error(error: Mapping[str, object]) -> dict[str, object]:
    return anthropic_error(error, code if isinstance(code := error["code"], int) else 500)


def _failed(error: Mapping[str, object], tokens: int) -> Frame:
    return _event("error", tokens, error=_error(error))


def _event(name: str, tokens: int, **fields: object) -> Frame:
    return Frame(sse(name, {"type": name, **fields}), tokens)
