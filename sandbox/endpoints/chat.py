"""Chat and text completions. Chat completions and legacy text completions, whole and as stream events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from sandbox.content import Choice, ToolCall
from sandbox.planning import Plan
from sandbox.wire import dumps

from .dialect import PROVIDER_DIED
from .usage import render_usage

FRAGMENT_TOKENS = 3
_NATIVE = {
    "anthropic": {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"},
    "google": {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP"},
}
_REASONING_FORMATS = {"anthropic": "anthropic-claude-v1", "google": "google-gemini-v1"}


class Wording(Protocol):
    """How the choices of one endpoint look."""

    whole: str
    chunk: str

    def choice(self, plan: Plan, choice: Choice) -> dict[str, object]:
        """The choice of an answer that is sent whole."""

    def deltas(self, plan: Plan, choice: Choice) -> Iterator[tuple[bytes, int]]:
        """The choice's stream events, and the tokens each adds."""

    def end(self, plan: Plan, choice: Choice, finish: str | None) -> dict[str, object]:
        """The choice of an event without content."""


def native_finish(plan: Plan, finish: str | None) -> str | None:
    """The finish reason in the provider's own words."""
    return finish if finish is None else _NATIVE.get(plan.model.style, {}).get(finish, finish)


class Chat:
    """`/chat/completions`."""

    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, plan: Plan, choice: Choice) -> dict[str, object]:
        shown = bool(choice.thoughts) and plan.shows_thoughts
        message: dict[str, object] = {
            "role": "assistant",
            "content": None if choice.tool else choice.text,
            "refusal": None,
            "reasoning": choice.thinking if shown else None,
        }
        if shown:
            message["reasoning_details"] = _reasoning_details(plan, choice.thinking)
        if choice.tool:
            message["tool_calls"] = [_tool_call(choice.tool, choice.text)]
        if plan.tokens.searches:
            message["annotations"] = _citations()
        return {
            "index": choice.index,
            "finish_reason": choice.finish,
            "native_finish_reason": native_finish(plan, choice.finish),
            "logprobs": None,
            "message": message,
            **({"error": PROVIDER_DIED} if choice.finish == "error" else {}),
        }

    def deltas(self, plan: Plan, choice: Choice) -> Iterator[tuple[bytes, int]]:
        for thought in choice.thoughts:
            if plan.shows_thoughts:
                details = _reasoning_details(plan, thought)
                yield _delta(choice, {"content": "", "reasoning": thought, "reasoning_details": details}), 1
        hidden = 0 if plan.shows_thoughts else len(choice.thoughts)
        if choice.tool:
            yield from self._fragments(choice, choice.tool, hidden)
            return
        before = b'{"index":%d,"delta":{"role":"assistant","content":' % choice.index
        for piece in choice.pieces:
            yield before + dumps(piece) + b'},"finish_reason":null,"native_finish_reason":null}', 1 + hidden
            hidden = 0

    def _fragments(self, choice: Choice, tool: ToolCall, hidden: int) -> Iterator[tuple[bytes, int]]:
        yield _delta(choice, {"content": None, "tool_calls": [_tool_call(tool, "")]}), tool.lead + hidden
        for start in range(0, len(choice.pieces), FRAGMENT_TOKENS):
            pieces = choice.pieces[start : start + FRAGMENT_TOKENS]
            yield _delta(choice, {"content": None, "tool_calls": [_fragment("".join(pieces))]}), len(pieces)
        yield _delta(choice, {"content": None, "tool_calls": [_fragment("")]}), 0

    def end(self, plan: Plan, choice: Choice, finish: str | None) -> dict[str, object]:
        return {
            "index": choice.index,
            "delta": {"role": "assistant", "content": ""},
            "finish_reason": finish,
            "native_finish_reason": native_finish(plan, finish),
        }


class Text:
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


def render_whole(plan: Plan, wording: Wording) -> dict[str, object]:
    """The body of an answer that is not streamed."""
    body: dict[str, object] = {
        "id": plan.id,
        "provider": plan.route.endpoint.provider,
        "model": plan.model.id,
        "object": wording.whole,
        "created": plan.generation.created,
        "system_fingerprint": None,
        "service_tier": None,
        "choices": [wording.choice(plan, choice) for choice in plan.choices],
    }
    if plan.behaviour.usage != "missing":
        body["usage"] = render_usage(plan, plan.tokens)
    return body


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
    form = _REASONING_FORMATS.get(plan.model.style, "unknown")
    return [{"type": "reasoning.text", "text": text, "format": form, "index": 0}]


def _citations() -> list[dict[str, object]]:
    citation = {
        "url": "https://example.com/",
        "title": "Example Domain",
        "content": "A made-up search result.",
        "start_index": 0,
        "end_index": 0,
    }
    return [{"type": "url_citation", "url_citation": citation}]
