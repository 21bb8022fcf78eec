"""A /responses request as a chat request. The same, said as a chat completion request.

Shapes: https://platform.openai.com/docs/api-reference/responses/create and OpenRouter's `ResponsesRequest`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sandbox.failures import refusal
from sandbox.planning import Body

ROLES = ("user", "assistant", "system", "developer")
_SAME = (
    "model",
    "models",
    "provider",
    "plugins",
    "reasoning",
    "parallel_tool_calls",
    "stream",
    "temperature",
    "top_p",
)
_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
    "text": "text",
}


def read_response_request(body: Body) -> Body:
    """The chat completion request that this one amounts to; raises Refusal (400)."""
    chat: dict[str, object] = {name: body[name] for name in _SAME if name in body}
    instructions = body.get("instructions")
    messages = (
        [{"role": "system", "content": instructions}]
        if isinstance(instructions, str) and instructions
        else []
    )
    chat["messages"] = [*messages, *_messages(body.get("input"))]
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = _limit(body["max_output_tokens"])
    tools = [_tool(tool) for tool in _objects(body.get("tools")) if tool.get("type") == "function"]
    if tools:
        chat["tools"] = tools
        chat["tool_choice"] = _tool_choice(body.get("tool_choice", "auto"))
    text = body.get("text")
    if isinstance(text, Mapping) and isinstance(text.get("format"), Mapping):
        chat["response_format"] = _format(text["format"])
    return chat


def _messages(said: object) -> Iterator[dict[str, object]]:
    if isinstance(said, str) and said:
        yield {"role": "user", "content": said}
        return
    if not isinstance(said, list) or not said:
        raise refusal(400, "input: Invalid input: expected string or array", error_type="invalid_request")
    for place, item in enumerate(said):
        if not isinstance(item, Mapping):
            raise refusal(400, f"input.{place}: Invalid input: expected object", error_type="invalid_request")
        yield _message(item, place)


def _message(item: Mapping[str, object], place: int) -> dict[str, object]:
    kind = item.get("type", "message")
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": function}],
        }
    if kind == "function_call_output":
        return {"role": "tool", "content": _content(item.get("output"))}
    if kind != "message":
        return {"role": "assistant", "content": _content(item.get("summary") or item.get("content"))}
    if item.get("role") not in ROLES:
        allowed = "|".join(f'"{role}"' for role in ROLES)
        raise refusal(
            400,
            f"input.{place}.role: Invalid option: expected one of {allowed}",
            error_type="invalid_request",
        )
    return {"role": item["role"], "content": _content(item.get("content"))}


def _content(content: object) -> object:
    return [_part(part) for part in _objects(content)] if isinstance(content, list) else content


def _part(part: Mapping[str, object]) -> dict[str, object]:
    kind = str(part.get("type"))
    if kind == "input_image":
        return {
            "type": "image_url",
            "image_url": {"url": part.get("image_url"), "detail": part.get("detail")},
        }
    if kind == "input_file":
        return {"type": "file"}
    return {**part, "type": _PARTS.get(kind, kind)}


def _tool(tool: Mapping[str, object]) -> dict[str, object]:
    function = {
        name: tool[name]
        for name in ("name", "description", "parameters", "strict")
        if tool.get(name) is not None
    }
    return {"type": "function", "function": function}


def _tool_choice(choice: object) -> object:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(wanted: Mapping[str, object]) -> dict[str, object]:
    if wanted.get("type") != "json_schema":
        return {"type": wanted.get("type")}
    return {
        "type": "json_schema",
        "json_schema": {"name": wanted.get("name"), "schema": wanted.get("schema")},
    }


def _limit(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refusal(400, "max_output_tokens must be at least 1", error_type="invalid_request")
    return value


def _objects(value: object) -> list[Mapping[str, object]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
