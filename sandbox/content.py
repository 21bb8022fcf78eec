"""What the simulated model says: text, JSON, tool arguments and reasoning.

Everything derives from the request alone, so that the same request always gets the same answer.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from . import tokens
from .schemas import sample
from .wire import dumps

ECHOED = 160
# The efforts of https://openrouter.ai/docs/use-cases/reasoning-tokens, and how many tokens each makes of it
# here.
REASONING_TOKENS = {"none": 0, "minimal": 6, "low": 12, "medium": 24, "high": 48, "xhigh": 72, "max": 96}
_INVENTED_TOOL = {
    "name": "lookup_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
_SENTENCES = (
    " These words are made up, so that you can try your code before you spend anything.",
    " Prices, tokens and shapes are those of the real service.",
    " Ask the same again and you get the same answer.",
    " An é, an ü, a 漢字 or a 🙂 takes several bytes.",
)
_STORY = "".join(_SENTENCES)
_THOUGHT = " The user wants an answer. I look at the request, weigh what it needs, and decide what to say."


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The call of one function. Its name costs `name_tokens` before the first argument."""

    id: str
    name: str
    name_tokens: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of a response: reasoning, then text or a tool call, whose arguments are the pieces."""

    index: int
    thoughts: tuple[str, ...]
    pieces: tuple[str, ...]
    finish: str
    tool: ToolCall | None = None
    stopped_by: str | None = None
    """The sequence from `stop` that ended the text."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def thinking(self) -> str:
        return "".join(self.thoughts)

    @property
    def tokens(self) -> int:
        return len(self.thoughts) + len(self.pieces) + (self.tool.name_tokens if self.tool else 0)


@dataclass(frozen=True, slots=True)
class Brief:
    """What a choice is made from, and the limits it must keep."""

    body: Mapping[str, object]
    max_tokens: int
    max_bytes: int | None
    thought_tokens: int
    wanted_tokens: int = 0
    calls_tool: bool = False


def compose(brief: Brief, index: int) -> Choice:
    """The choice with this index. It is the same for the same brief."""
    thoughts = tuple(_repeat(_THOUGHT, brief.thought_tokens)[: brief.max_tokens])
    room = brief.max_tokens - len(thoughts)
    if room == 0 and thoughts:
        # The reasoning counts towards the limit, and may use all of it.
        return Choice(index, thoughts, (), "length")
    function = _called_function(brief)
    if function is not None:
        return _call(function, brief, index, thoughts, room)
    uncut, stopped_by = _pieces(brief, index)
    pieces, finish = _cut(uncut, room, brief.max_bytes)
    return Choice(index, thoughts, pieces, finish, stopped_by=stopped_by if finish == "stop" else None)


def _pieces(brief: Brief, index: int) -> tuple[list[str], str | None]:
    """The tokens of the answer, and the stop sequence that ended it."""
    structured = _structured(brief.body)
    if structured is not None:
        return tokens.split(structured), None
    opening = f"The sandbox read “{_last_words(brief.body)}”."
    first = zlib.crc32(opening.encode()) + index
    if length := _possible_length(brief):
        pieces = (tokens.split(opening) + _repeat(_STORY, length))[:length]
    else:
        following = "".join(_SENTENCES[(first + k) % len(_SENTENCES)] for k in range(2))
        pieces = tokens.split(opening + following)
    return _stop(pieces, brief.body.get("stop"))


def _possible_length(brief: Brief) -> int:
    """The wanted length, or one token more than the limits allow.

    No request can make us write a long text that is then cut off.
    """
    length = min(brief.wanted_tokens, brief.max_tokens + 1)
    return length if brief.max_bytes is None else min(length, brief.max_bytes + 1)


def _cut(pieces: Sequence[str], room: int, max_bytes: int | None) -> tuple[tuple[str, ...], str]:
    """The pieces that fit, and the finish reason."""
    fitting = list(pieces[:room])
    if max_bytes is not None:
        ends = accumulate(len(piece.encode()) for piece in fitting)
        fitting = fitting[: sum(end <= max_bytes for end in ends)]
    return tuple(fitting), "length" if len(fitting) < len(pieces) else "stop"


def _stop(pieces: list[str], stop: object) -> tuple[list[str], str | None]:
    """The pieces before the first stop sequence, and that sequence."""
    sequences = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    text = "".join(pieces)
    places = [
        (text.find(item), item) for item in sequences if isinstance(item, str) and item and item in text
    ]
    if not places:
        return pieces, None
    position, sequence = min(places)
    return tokens.split(text[:position]), sequence


def _call(
    function: Mapping[str, object], brief: Brief, index: int, thoughts: tuple[str, ...], room: int
) -> Choice:
    name = str(function.get("name", "tool"))
    schema = function.get("parameters") or {"type": "object"}
    arguments = dumps(sample(schema, _last_words(brief.body)[:40])).decode()
    name_tokens = min(tokens.count(name), room)
    pieces, finish = _cut(tokens.split(arguments), room - name_tokens, brief.max_bytes)
    tool = ToolCall(f"call_{zlib.crc32(f'{name}{arguments}{index}'.encode()):08x}", name, name_tokens)
    return Choice(index, thoughts, pieces, "tool_calls" if finish == "stop" else finish, tool)


def _called_function(brief: Brief) -> Mapping[str, object] | None:
    """The function that the answer calls, if any."""
    offered: list[Mapping[str, object]] = [
        tool["function"]
        for tool in _list(brief.body.get("tools"))
        if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping)
    ]
    if brief.calls_tool:
        return offered[0] if offered else _INVENTED_TOOL
    return _chosen(offered, brief.body.get("tool_choice", "auto"), _last_role(brief.body))


def _chosen(
    offered: list[Mapping[str, object]], choice: object, last_role: object
) -> Mapping[str, object] | None:
    """The function that `tool_choice` picks. https://openrouter.ai/docs/features/tool-calling"""
    if not offered or choice == "none":
        return None
    if isinstance(choice, Mapping) and isinstance(choice.get("function"), Mapping):
        name = choice["function"].get("name")
        return next((function for function in offered if function.get("name") == name), offered[0])
    # A tool's result is answered in words, or a conversation with tools would never end.
    return None if choice == "auto" and last_role == "tool" else offered[0]


def _structured(body: Mapping[str, object]) -> str | None:
    """The JSON that `response_format` demands. https://openrouter.ai/docs/features/structured-outputs"""
    response_format = body.get("response_format")
    if not isinstance(response_format, Mapping):
        return None
    words = _last_words(body)
    if response_format.get("type") == "json_object":
        return dumps({"answer": words, "source": "sandbox"}).decode()
    schema = response_format.get("json_schema")
    if response_format.get("type") == "json_schema" and isinstance(schema, Mapping):
        return dumps(sample(schema.get("schema"), words[:40])).decode()
    return None


def _last_words(body: Mapping[str, object]) -> str:
    """The end of the conversation, shortened. The answer derives from it."""
    messages = _list(body.get("messages"))
    last = messages[-1] if messages else None
    content = last.get("content") if isinstance(last, Mapping) else body.get("prompt")
    if isinstance(content, list):
        content = " ".join(_words(part) for part in content[:ECHOED])
    return " ".join(str(content or "")[: 2 * ECHOED].split())[:ECHOED]


def _words(part: object) -> str:
    if not isinstance(part, Mapping):
        return str(part)
    text = part.get("text")
    return text[:ECHOED] if isinstance(text, str) else f"[{part.get('type')}]"


def _last_role(body: Mapping[str, object]) -> object:
    messages = _list(body.get("messages"))
    return messages[-1].get("role") if messages and isinstance(messages[-1], Mapping) else None


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


# Split once: a long answer repeats the same tokens.
_REPEATED = {text: tokens.split(text) for text in (_STORY, _THOUGHT)}


def _repeat(text: str, length: int) -> list[str]:
    pieces = _REPEATED[text]
    return (pieces * (length // len(pieces) + 1))[:length]
