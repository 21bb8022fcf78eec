"""Translates a `/responses` request into a chat completion request, which is then planned.

Shapes: https://platform.openai.com/docs/api-reference/responses/create, and `ResponsesRequest` of
OpenRouter's OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sandbox.failures import invalid_request
from sandbox.planning import Body
from sandbox.request_fields import objects, require_positive, require_role

ROLES = ("user", "assistant", "system", "developer")
# Fields that mean the same in both APIs.
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
# Parts whose text is named otherwise.
_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
    "text": "text",
}


def read_response_request(body: Body) -> Body:
    """The equivalent chat completion request; raises Refusal (400)."""
    chat: dict[str, object] = {name: body[name] for name in _SAME if name in body}
    chat["messages"] = [*_instructions(body.get("instructions")), *_messages(body.get("input"))]
    limit = body.get("max_output_tokens")
    if limit is not None:
        chat["max_completion_tokens"] = require_positive(limit, "max_output_tokens must be at least 1")
    return {**chat, **_tools(body), **_response_format(body.get("text"))}


def _instructions(instructions: object) -> list[dict[str, object]]:
    has_text = isinstance(instructions, str) and instructions
    return [{"role": "system", "content": instructions}] if has_text else []


def _tools(body: Body) -> dict[str, object]:
    # The other types run on OpenAI's servers, and the model does not call them through the client.
    tools = [_tool(tool) for tool in objects(body.get("tools")) if tool.get("type") == "function"]
    return {"tools": tools, "tool_choice": _tool_choice(body.get("tool_choice", "auto"))} if tools else {}


def _response_format(text: object) -> dict[str, object]:
    text_format = text.get("format") if isinstance(text, Mapping) else None
    return {"response_format": _format(text_format)} if isinstance(text_format, Mapping) else {}


def _messages(items: object) -> Iterator[dict[str, object]]:
    if isinstance(items, str) and items:
        yield {"role": "user", "content": items}
        return
    if not isinstance(items, list) or not items:
        raise invalid_request("input: Invalid input: expected string or array")
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise invalid_request(f"input.{index}: Invalid input: expected object")
        yield _message(item, f"input.{index}")


def _message(item: Mapping[str, object], path: str) -> dict[str, object]:
    kind = item.get("type", "message")
    if kind == "function_call":
        return _function_call(item)
    if kind == "function_call_output":
        return {"role": "tool", "content": _content(item.get("output"))}
    if kind != "message":
        # Reasoning of an earlier turn, above all.
        return {"role": "assistant", "content": _content(item.get("summary") or item.get("content"))}
    role = require_role(item, ROLES, path)
    return {"role": role, "content": _content(item.get("content"))}


def _function_call(item: Mapping[str, object]) -> dict[str, object]:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    calls = [{"type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _content(content: object) -> object:
    return [_part(part) for part in objects(content)] if isinstance(content, list) else content


def _part(part: Mapping[str, object]) -> dict[str, object]:
    kind = str(part.get("type"))
    if kind == "input_image":
        image = {"url": part.get("image_url"), "detail": part.get("detail")}
        return {"type": "image_url", "image_url": image}
    if kind == "input_file":
        return {"type": "file"}
    return {**part, "type": _PARTS.get(kind, kind)}


def _tool(tool: Mapping[str, object]) -> dict[str, object]:
    names = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: object) -> object:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(text_format: Mapping[str, object]) -> dict[str, object]:
    """Chat completions put a schema one level deeper."""
    kind = text_format.get("type")
    if kind != "json_schema":
        return {"type": kind}
    json_schema = {"name": text_format.get("name"), "schema": text_format.get("schema")}
    return {"type": "json_schema", "json_schema": json_schema}
