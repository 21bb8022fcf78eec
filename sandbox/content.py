"""What the simulated model says. Text, JSON, tool arguments and reasoning, derived from nothing but the
request.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import tokens
from .schemas import sample
from .wire import dumps

ECHOED = 160
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
    """The call of one function; its name costs `lead` tokens before the first argument."""

    id: str
    name: str
    lead: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer: reasoning, then text, or a tool call whose arguments are the pieces."""

    index: int
    thoughts: tuple[str, ...]
    pieces: tuple[str, ...]
    finish: str
    tool: ToolCall | None = None
    stopped_by: str | None = None
    """The sequence of `stop` that ended the text."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def thinking(self) -> str:
        return "".join(self.thoughts)

    @property
    def tokens(self) -> int:
        return len(self.thoughts) + len(self.pieces) + (self.tool.lead if self.tool else 0)


@dataclass(frozen=True, slots=True)
class Brief:
    """What an answer has to be like."""

    body: Mapping[str, object]
    most_tokens: int
    most_bytes: int | None
    thought_tokens: int
    wanted_tokens: int = 0
    calls_tool: bool = False


def compose(brief: Brief, index: int) -> Choice:
    """The answer with this index; the same for the same brief."""
    thoughts = tuple(_repeat(_THOUGHT, brief.thought_tokens)[: brief.most_tokens])
    room = brief.most_tokens - len(thoughts)
    if room == 0 and thoughts:
        return Choice(index, thoughts, (), "length")
    function = _called_function(brief)
    if function is not None:
        return _call(function, brief, index, thoughts, room)
    whole, stopped_by = _pieces(brief, index)
    pieces, finish = _cut(whole, room, brief.most_bytes)
    return Choice(index, thoughts, pieces, finish, stopped_by=stopped_by if finish == "stop" else None)


def _pieces(brief: Brief, index: int) -> tuple[list[str], str | None]:
    structured = _structured(brief.body)
    if structured is not None:
        return tokens.split(structured), None
    text = f"The sandbox read “{_last_words(brief.body)}”."
    first = zlib.crc32(text.encode()) + index
    if wanted := _fitting(brief):
        pieces = (tokens.split(text) + _repeat(_STORY, wanted))[:wanted]
    else:
        pieces = tokens.split(text + "".join(_SENTENCES[(first + k) % len(_SENTENCES)] for k in range(2)))
    return _stop(pieces, brief.body.get("stop"))


def _fitting(brief: Brief) -> int:
    """The length asked for, or one token more than fits: no request makes us write what is cut off again."""
    fitting = min(brief.wanted_tokens, brief.most_tokens + 1)
    return fitting if brief.most_bytes is None else min(fitting, brief.most_bytes + 1)


def _cut(pieces: Sequence[str], room: int, most_bytes: int | None) -> tuple[tuple[str, ...], str]:
    kept = list(pieces[:room])
    if most_bytes is not None:
        size = 0
        for place, piece in enumerate(kept):
            size += len(piece.encode())
            if size > most_bytes:
                del kept[place:]
                break
    return tuple(kept), "length" if len(kept) < len(pieces) else "stop"


def _stop(pieces: list[str], stop: object) -> tuple[list[str], str | None]:
    ends = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    text = "".join(pieces)
    found = [(text.find(end), end) for end in ends if isinstance(end, str) and end and end in text]
    return (tokens.split(text[: min(found)[0]]), min(found)[1]) if found else (pieces, None)


def _call(
    function: Mapping[str, object], brief: Brief, index: int, thoughts: tuple[str, ...], room: int
) -> Choice:
    name = str(function.get("name", "tool"))
    arguments = dumps(
        sample(function.get("parameters") or {"type": "object"}, _last_words(brief.body)[:40])
    ).decode()
    lead = min(tokens.count(name), room)
    pieces, finish = _cut(tokens.split(arguments), room - lead, brief.most_bytes)
    seed = zlib.crc32(f"{name}{arguments}{index}".encode())
    return Choice(
        index,
        thoughts,
        pieces,
        "tool_calls" if finish == "stop" else finish,
        ToolCall(f"call_{seed:08x}", name, lead),
    )


def _called_function(brief: Brief) -> Mapping[str, object] | None:
    """The function that the answer calls, if any: a tool's result is answered in words, unless a call is
    required.
    """
    offered: list[Mapping[str, object]] = [
        tool["function"]
        for tool in _list(brief.body.get("tools"))
        if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping)
    ]
    choice = brief.body.get("tool_choice", "auto")
    if brief.calls_tool:
        return offered[0] if offered else _INVENTED_TOOL
    if not offered or choice == "none":
        return None
    if isinstance(choice, Mapping) and isinstance(choice.get("function"), Mapping):
        name = choice["function"].get("name")
        return next((function for function in offered if function.get("name") == name), offered[0])
    if choice == "auto" and _last_role(brief.body) == "tool":
        return None
    return offered[0]


def _structured(body: Mapping[str, object]) -> str | None:
    wanted = body.get("response_format")
    if not isinstance(wanted, Mapping):
        return None
    words = _last_words(body)
    if wanted.get("type") == "json_object":
        return dumps({"answer": words, "source": "sandbox"}).decode()
    schema = wanted.get("json_schema")
    if wanted.get("type") == "json_schema" and isinstance(schema, Mapping):
        return dumps(sample(schema.get("schema"), words[:40])).decode()
    return None


def _last_words(body: Mapping[str, object]) -> str:
    """The end of the conversation, shortened: what the answer is derived from."""
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


_REPEATED = {text: tokens.split(text) for text in (_STORY, _THOUGHT)}


def _repeat(text: str, wanted: int) -> list[str]:
    pieces = _REPEATED[text]
    return (pieces * (wanted // len(pieces) + 1))[:wanted]
