"""The choices of chat completions and legacy text completions, whole and as stream events.

Shapes: https://openrouter.ai/docs/api-reference/overview
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from sandbox.content import Choice, ToolCall
from sandbox.planning import Plan
from sandbox.wire import dumps

from .dialect import PROVIDER_DIED, fragments
from .usage import render_usage

# OpenRouter normalizes finish reasons, and keeps the provider's own beside them.
_NATIVE = {
    "anthropic": {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"},
    "google": {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP"},
}
_REASONING_FORMATS = {"anthropic": "anthropic-claude-v1", "google": "google-gemini-v1"}


class ChoiceFormat(Protocol):
    """The form that one endpoint gives its choices."""

    whole: str
    chunk: str

    def choice(self, plan: Plan, choice: Choice) -> dict[str, object]:
        """The choice of a response that is sent whole."""

    def deltas(self, plan: Plan, choice: Choice) -> Iterator[tuple[bytes, int]]:
        """The choice's stream events, and the number of tokens that each adds."""

    def end(self, plan: Plan, choice: Choice, finish: str | None) -> dict[str, object]:
        """The choice in an event without content."""


def native_finish(plan: Plan, finish: str | None) -> str | None:
    """The finish reason in the provider's own words."""
    return finish if finish is None else _NATIVE.get(plan.model.style, {}).get(finish, finish)


class ChatFormat:
    """`/chat/completions`."""

    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, plan: Plan, choice: Choice) -> dict[str, object]:
        return {
            "index": choice.index,
            "finish_reason": choice.finish,
            "native_finish_reason": native_finish(plan, choice.finish),
            "logprobs": None,
            "message": _message(plan, choice),
            **({"error": PROVIDER_DIED} if choice.finish == "error" else {}),
        }

    def deltas(self, plan: Plan, choice: Choice) -> Iterator[tuple[bytes, int]]:
        if plan.shows_thoughts:
            for thought in choice.thoughts:
                details = _reasoning_details(plan, thought)
                yield _delta(choice, {"content": "", "reasoning": thought, "reasoning_details": details}), 1
        # Hidden reasoning is billed all the same, so the first visible event counts it.
        hidden = 0 if plan.shows_thoughts else len(choice.thoughts)
        if choice.tool:
            yield from self._tool_deltas(choice, choice.tool, hidden)
        else:
            yield from self._text_deltas(choice, hidden)

    def _text_deltas(self, choice: Choice, hidden: int) -> Iterator[tuple[bytes, int]]:
        # Written by hand, because a long stream has thousands of these.
        before = b'{"index":%d,"delta":{"role":"assistant","content":' % choice.index
        for piece in choice.pieces:
            yield before + dumps(piece) + b'},"finish_reason":null,"native_finish_reason":null}', 1 + hidden
            hidden = 0

    def _tool_deltas(self, choice: Choice, tool: ToolCall, hidden: int) -> Iterator[tuple[bytes, int]]:
        opening: dict[str, object] = {"content": None, "tool_calls": [_tool_call(tool, "")]}
        yield _delta(choice, opening), tool.name_tokens + hidden
        for arguments, tokens in fragments(choice.pieces):
            yield _delta(choice, {"content": None, "tool_calls": [_fragment(arguments)]}), tokens
        yield _delta(choice, {"content": None, "tool_calls": [_fragment("")]}), 0

    def end(self, plan: Plan, choice: Choice, finish: str | None) -> dict[str, object]:
        return {
            "index": choice.index,
            "delta": {"role": "assistant", "content": ""},
            "finish_reason": finish,
            "native_finish_reason": native_finish(plan, finish),
        }


class TextFormat:
    """The legacy `/completions`."""

    whole = "text_completion"
    chunk = "text_completion"

    def choice(self, plan: Plan, choice: Choice) -> dict[str, object]:
        return {**self.end(plan, choice, choice.finish), "text": choice.text}

    def deltas(self, plan: Plan, choice: Choice) -> Iterator[tuple[bytes, int]]:
        hidden = len(choice.thoughts)
        for piece in choice.pieces:
            yield dumps({**self.end(plan, choice, None), "text": piece}), 1 + hidden
            hidden = 0

    def end(self, plan: Plan, choice: Choice, finish: str | None) -> dict[str, object]:
        return {
            "index": choice.index,
            "text": "",
            "logprobs": None,
            "finish_reason": finish,
            "native_finish_reason": native_finish(plan, finish),
        }


def render_whole(plan: Plan, choice_format: ChoiceFormat) -> dict[str, object]:
    """The body of a response that is not streamed."""
    body: dict[str, object] = {
        "id": plan.id,
        "provider": plan.route.endpoint.provider,
        "model": plan.model.id,
        "object": choice_format.whole,
        "created": plan.generation.created,
        "system_fingerprint": None,
        "service_tier": None,
        "choices": [choice_format.choice(plan, choice) for choice in plan.choices],
    }
    if plan.behaviour.usage != "missing":
        body["usage"] = render_usage(plan, plan.tokens)
    return body


def _message(plan: Plan, choice: Choice) -> dict[str, object]:
    has_thoughts = bool(choice.thoughts) and plan.shows_thoughts
    message: dict[str, object] = {
        "role": "assistant",
        "content": None if choice.tool else choice.text,
        "refusal": None,
        "reasoning": choice.thinking if has_thoughts else None,
    }
    if has_thoughts:
        message["reasoning_details"] = _reasoning_details(plan, choice.thinking)
    if choice.tool:
        message["tool_calls"] = [_tool_call(choice.tool, choice.text)]
    if plan.tokens.searches:
        message["annotations"] = _citations()
    return message


def _delta(choice: Choice, fields: dict[str, object]) -> bytes:
    delta = {"role": "assistant", **fields}
    return dumps({"index": choice.index, "delta": delta, "finish_reason": None, "native_finish_reason": None})


def _tool_call(tool: ToolCall, arguments: str) -> dict[str, object]:
    return {
        "index": 0,
        "id": tool.id,
        "type": "function",
        "function": {"name": tool.name, "arguments": arguments},
    }


def _fragment(arguments: str) -> dict[str, object]:
    return {"index": 0, "function": {"arguments": arguments}}


def _reasoning_details(plan: Plan, text: str) -> list[dict[str, object]]:
    # https://openrouter.ai/docs/use-cases/reasoning-tokens: clients send these back unchanged.
    details_format = _REASONING_FORMATS.get(plan.model.style, "unknown")
    return [{"type": "reasoning.text", "text": text, "format": details_format, "index": 0}]


def _citations() -> list[dict[str, object]]:
    # https://openrouter.ai/docs/guides/features/plugins/web-search: results come as OpenAI's annotations.
    citation = {
        "url": "https://example.com/",
        "title": "Example Domain",
        "content": "A made-up search result.",
        "start_index": 0,
        "end_index": 0,
    }
    return [{"type": "url_citation", "url_citation": citation}]
