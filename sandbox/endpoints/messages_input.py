"""Translates a `/messages` request into a chat completion request, which is then planned.

Shapes: https://docs.anthropic.com/en/api/messages, and `MessagesRequest` of OpenRouter's OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sandbox.failures import invalid_request
from sandbox.planning import Body
from sandbox.request_fields import objects, require_positive
from sandbox.wire import dumps

# Fields that mean the same in both APIs.
_SAME = ("model", "models", "provider", "plugins", "stream", "temperature", "top_p", "top_k")


def read_message_request(body: Body) -> Body:
    """The equivalent chat completion request; raises Refusal (400)."""
    limit = _limit(body.get("max_tokens"))
    return {
        **{name: body[name] for name in _SAME if name in body},
        "max_tokens": limit,
        "messages": [*_system(body.get("system")), *_messages(body.get("messages"))],
        **({"stop": body["stop_sequences"]} if body.get("stop_sequences") else {}),
        **_tools(body),
        **_reasoning(body.get("thinking"), limit),
        **_fallbacks(body),
    }


def _tools(body: Body) -> dict[str, object]:
    # A tool without a schema runs on Anthropic's servers, and the model does not call it through the client.
    tools = [_tool(tool) for tool in objects(body.get("tools")) if "input_schema" in tool]
    return {"tools": tools, "tool_choice": _tool_choice(body.get("tool_choice"))} if tools else {}


def _fallbacks(body: Body) -> dict[str, object]:
    models = [fallback.get("model") for fallback in objects(body.get("fallbacks"))]
    return {"models": models} if models else {}


def _system(system: object) -> list[dict[str, object]]:
    return [{"role": "system", "content": system}] if system else []


def _messages(messages: object) -> Iterator[dict[str, object]]:
    if not isinstance(messages, list) or not messages:
        raise invalid_request("messages: at least one message is required")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ("user", "assistant", "system"):
            raise invalid_request(f'messages.{index}.role: Input should be "user", "assistant" or "system"')
        yield from _message(message, index)


def _message(message: Mapping[str, object], index: int) -> Iterator[dict[str, object]]:
    content = message.get("content")
    if isinstance(content, list):
        yield from _blocks(str(message["role"]), objects(content))
    elif isinstance(content, str):
        yield {"role": message["role"], "content": content}
    else:
        raise invalid_request(f"messages.{index}.content: Input should be a valid string or list")


def _blocks(role: str, blocks: list[Mapping[str, object]]) -> Iterator[dict[str, object]]:
    """The message without its tool blocks, then those blocks as messages of their own."""
    parts = [_part(block) for block in blocks if block.get("type") not in ("tool_use", "tool_result")]
    if parts:
        yield {"role": role, "content": parts}
    # A tool's result comes last, so that the answer refers to it.
    for block in blocks:
        if block.get("type") == "tool_use":
            yield _tool_use(block)
        elif block.get("type") == "tool_result":
            yield {"role": "tool", "content": _tool_result(block.get("content"))}


def _tool_use(block: Mapping[str, object]) -> dict[str, object]:
    function = {"name": block.get("name"), "arguments": dumps(block.get("input")).decode()}
    calls = [{"type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _tool_result(content: object) -> object:
    return [_part(part) for part in objects(content)] if isinstance(content, list) else content


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


def _reasoning(thinking: object, limit: int) -> dict[str, object]:
    """Anthropic's `thinking` as OpenRouter's `reasoning`, if there is any."""
    if not isinstance(thinking, Mapping):
        return {}
    if thinking.get("type") == "disabled":
        return {"reasoning": {"enabled": False}}
    if thinking.get("type") != "enabled":
        # Adaptive thinking lets the model decide.
        return {"reasoning": {"effort": "medium"}}
    return {"reasoning": {"max_tokens": _thinking_budget(thinking.get("budget_tokens"), limit)}}


def _thinking_budget(budget: object, limit: int) -> int:
    # https://docs.anthropic.com/en/docs/build-with-claude/extended-thinking: at least 1,024, below
    # max_tokens.
    if not isinstance(budget, int) or budget < 1024:
        message = "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024"
        raise invalid_request(message)
    if budget >= limit:
        raise invalid_request("`max_tokens` must be greater than `thinking.budget_tokens`")
    return budget


def _limit(value: object) -> int:
    # Anthropic's API, unlike the others, requires a limit.
    if value is None:
        raise invalid_request("max_tokens: Field required")
    return require_positive(value, "max_tokens: Input should be greater than or equal to 1")
