"""`/messages`: Anthropic's message and its events. The usage includes the cost, which the schema leaves open.

Shapes: https://docs.anthropic.com/en/docs/build-with-claude/streaming, and `MessagesResult` and
`MessagesStreamEvents` of OpenRouter's OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import orjson

from sandbox.content import Choice
from sandbox.failures import anthropic_error
from sandbox.planning import Body, Plan, RequestSettings, plan_completion

from .dialect import PROVIDER_DIED, STREAM_ERRORS, TOO_LATE, Frame, JsonDialect, fragments, sse
from .messages_input import read_message_request
from .usage import render_message_usage

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_EMPTY: Mapping[str, Mapping[str, object]] = {
    "thinking": {"thinking": "", "signature": ""},
    "tool_use": {"input": {}},
    "text": {"text": ""},
}
_MONEY = ("cost", "is_byok", "cost_details")


def plan_message(body: Body, settings: RequestSettings) -> tuple[Plan, Messages]:
    """Plans a message; raises Refusal."""
    return plan_completion(read_message_request(body), settings), Messages()


class Messages(JsonDialect):
    """`/messages`."""

    farewell = sse("error", {"type": "error", "error": anthropic_error(TOO_LATE, 504)})

    def render(self, plan: Plan) -> Mapping[str, object]:
        choice = plan.choices[0]
        error = {"error": anthropic_error(PROVIDER_DIED, 502)} if choice.finish == "error" else {}
        return {
            **_message(plan),
            "content": [_block(kind, choice) for kind in _kinds(plan)],
            **_ending(choice),
            **_usage(plan),
            **error,
        }

    def render_error(self, error: Mapping[str, object]) -> Mapping[str, object]:
        return {"type": "error", "error": _error(error), "request_id": None}

    def frames(self, plan: Plan) -> Iterator[Frame]:
        failure, choice = plan.behaviour.stream_error, plan.choices[0]
        if failure and not plan.behaviour.after:
            # The scenario error-first: not even message_start comes before the error.
            yield _failed(STREAM_ERRORS[failure], 0)
            return
        yield _event("message_start", 0, message=_started(plan))
        tokens = 0
        for index, kind in enumerate(_kinds(plan)):
            for frame in _block_frames(plan, kind, index, tokens, cut=bool(failure)):
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


def _usage(plan: Plan) -> dict[str, object]:
    return {} if plan.behaviour.usage == "missing" else {"usage": render_message_usage(plan, plan.tokens)}


def _ending(choice: Choice) -> dict[str, object]:
    reason = "stop_sequence" if choice.stopped_by else _REASONS.get(choice.finish)
    return {"stop_reason": reason, "stop_sequence": choice.stopped_by}


def _started(plan: Plan) -> dict[str, object]:
    """The message of the first event. Its usage counts one output token and has no cost."""
    if plan.behaviour.usage == "missing":
        return _message(plan)
    first = replace(plan.tokens, completion=min(1, plan.tokens.completion), reasoning=0)
    usage = {name: value for name, value in render_message_usage(plan, first).items() if name not in _MONEY}
    return {**_message(plan), "usage": usage}


def _kinds(plan: Plan) -> list[str]:
    """The kinds of the content blocks: thinking, then text or a tool's use."""
    choice = plan.choices[0]
    thinking = ["thinking"] if choice.thoughts and plan.shows_thoughts else []
    output = ["tool_use" if choice.tool else "text"] if choice.pieces or choice.tool else []
    return [*thinking, *output]


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
    """The tool's input. It is empty where the token limit has cut the arguments."""
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}


def _signature(choice: Choice) -> str:
    return f"sandbox-{len(choice.thoughts)}"


def _block_frames(plan: Plan, kind: str, index: int, tokens: int, *, cut: bool) -> Iterator[Frame]:
    choice = plan.choices[0]
    tokens += choice.tool.name_tokens if kind == "tool_use" and choice.tool else 0
    empty = {**_block(kind, choice), **_EMPTY[kind]}
    yield _event("content_block_start", tokens, index=index, content_block=empty)
    if index == 0:
        # Anthropic sends pings at any time; clients must expect one early.
        yield _event("ping", tokens)
    # Hidden reasoning is billed all the same.
    tokens += 0 if plan.shows_thoughts else len(choice.thoughts)
    for delta, added in _deltas(kind, choice):
        tokens += added
        yield _event("content_block_delta", tokens, index=index, delta=delta)
    if not cut:
        yield _event("content_block_stop", tokens, index=index)


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
        for arguments, added in fragments(choice.pieces):
            yield {"type": "input_json_delta", "partial_json": arguments}, added


def _end(plan: Plan, choice: Choice) -> Iterator[Frame]:
    behaviour, tokens = plan.behaviour, plan.tokens.completion
    if behaviour.usage == "missing" and not behaviour.done:
        return
    for _ in range(2 if behaviour.usage == "twice" else 1):
        yield _event("message_delta", tokens, delta=_ending(choice), **_usage(plan))
    if behaviour.done:
        yield _event("message_stop", tokens)


def _error(error: Mapping[str, object]) -> dict[str, object]:
    # An error with a text as its code has no status, and counts as a failure of the server.
    return anthropic_error(error, code if isinstance(code := error["code"], int) else 500)


def _failed(error: Mapping[str, object], tokens: int) -> Frame:
    return _event("error", tokens, error=_error(error))


def _event(name: str, tokens: int, **fields: object) -> Frame:
    return Frame(sse(name, {"type": name, **fields}), tokens)
