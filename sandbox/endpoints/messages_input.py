"""A /messages request as a chat request. The same, said as a chat completion request.

Shapes: https://docs.anthropic.com/en/api/messages and OpenRouter's `MessagesRequest`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sandbox.failures import refusal
from sandbox.planning import Body
from sandbox.wire import dumps

_SAME = ("model", "models", "provider", "plugins", "stream", "temperature", "top_p", "top_k")


def read_message_request(body: Body) -> Body:
    """The chat completion request that this one amounts to; raises Refusal (400)."""
    limit = _limit(body.get("max_tokens"))
    chat: dict[str, object] = {name: body[name] for name in _SAME if name in body}
    chat["max_tokens"] = limit
    chat["messages"] = [*_system(body.get("system")), *_messages(body.get("messages"))]
    if body.get("stop_sequences"):
        chat["stop"] = body["stop_sequences"]
    tools = [_tool(tool) for tool in _objects(body.get("tools")) if "input_schema" in tool]
    if tools:
        chat["tools"] = tools
        chat["tool_choice"] = _tool_choice(body.get("tool_choice"))
    thinking = body.get("thinking")
    if isinstance(thinking, Mapping):
        chat["reasoning"] = _reasoning(thinking, limit)
    fallbacks = _objects(body.get("fallbacks"))
    if fallbacks:
        chat["models"] = [fallback.get("model") for fallback in fallbacks]
    return chat


def _system(system: object) -> list[dict[str, object]]:
    return [{"role": "system", "content": system}] if system else []


def _messages(said: object) -> Iterator[dict[str, object]]:
    if not isinstance(said, list) or not said:
        raise _wrong("messages: at least one message is required")
    for place, message in enumerate(said):
        if not isinstance(message, Mapping) or message.get("role") not in ("user", "assistant", "system"):
            raise _wrong(f'messages.{place}.role: Input should be "user", "assistant" or "system"')
        content = message.get("content")
        if isinstance(content, list):
            yield from _blocks(str(message["role"]), _objects(content))
        elif isinstance(content, str):
            yield {"role": message["role"], "content": content}
        else:
            raise _wrong(f"messages.{place}.content: Input should be a valid string or list")


def _blocks(role: str, blocks: list[Mapping[str, object]]) -> Iterator[dict[str, object]]:
    """The message without its tool blocks, then those; so that a tool's result stands last, and is answered."""
    parts = [_part(block) for block in blocks if block.get("type") not in ("tool_use", "tool_result")]
    if parts:
        yield {"role": role, "content": parts}
    for block in blocks:
        if block.get("type") == "tool_use":
            function = {"name": block.get("name"), "arguments": dumps(block.get("input")).decode()}
            yield {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": function}],
            }
        elif block.get("type") == "tool_result":
            content = block.get("content")
            yield {
                "role": "tool",
                "content": [_part(part) for part in _objects(content)]
                if isinstance(content, list)
                else content,
            }


def _part(block: Mapping[str, object]) -> dict[str, object]:
    kind = block.get("type")
    if kind == "image":
        return {"type": "image_url", "image_url": {}}
    if kind == "document":
        return {"type": "file"}
    text = block.get("text") or block.get("thinking") or ""
    return {"type": "text", "text": text, **({"cache_control": 1} if block.get("cache_control") else {})}


def _tool(tool: Mapping[str, object]) -> dict[str, object]:
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool["input_schema"],
    }
    return {"type": "function", "function": function}


def _tool_choice(choice: object) -> object:
    if not isinstance(choice, Mapping):
        return "auto"
    if choice.get("type") == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return {"any": "required", "none": "none"}.get(str(choice.get("type")), "auto")


def _reasoning(thinking: Mapping[str, object], limit: int) -> dict[str, object]:
    if thinking.get("type") == "disabled":
        return {"enabled": False}
    budget = thinking.get("budget_tokens")
    if thinking.get("type") != "enabled":
        return {"effort": "medium"}
    if not isinstance(budget, int) or budget < 1024:
        raise _wrong("thinking.enabled.budget_tokens: Input should be greater than or equal to 1024")
    if budget >= limit:
        raise _wrong("`max_tokens` must be greater than `thinking.budget_tokens`")
    return {"max_tokens": budget}


def _limit(value: object) -> int:
    if value is None:
        raise _wrong("max_tokens: Field required")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong("max_tokens: Input should be greater than or equal to 1")
    return value


def _wrong(message: str) -> Exception:
    return refusal(400, message, error_type="invalid_request")


def _objects(value: object) -> list[Mapping[str, object]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
