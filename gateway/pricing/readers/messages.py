"""The body of Anthropic's Messages: its content blocks, and the fields of that endpoint alone.

Source: https://openrouter.ai/docs/api/api-reference/anthropic-messages/create-a-message
"""

from __future__ import annotations

from common.errors import BadRequest, UnboundedCost
from common.json_types import Json, JsonObject
from gateway.pricing.cost_drivers import (
    MESSAGE_TOKENS,
    SCHEMA_TOKENS,
    CostDrivers,
    integer,
    list_of,
    object_of,
    refuse_foreign,
    refuse_unbounded,
    require_list,
    wrong,
)
from gateway.pricing.readers.content_parts import size_of, unknown_kind

UNBOUNDED = {
    "mcp_servers": "Tools that the provider runs on other servers have no bound.",
    "container": "Containers are billed by the hour.",
}
# These only leave something out; what is compacted instead is billed beyond any output limit.
CONTEXT_EDITS = frozenset(("clear_tool_uses_20250919", "clear_thinking_20251015"))

SYSTEM_BLOCKS = frozenset(("text",))
RESULT_BLOCKS = frozenset(("text", "image", "document", "search_result", "tool_reference"))
BLOCKS = RESULT_BLOCKS | {
    "tool_use",
    "tool_result",
    "thinking",
    "redacted_thinking",
    "server_tool_use",
    "web_search_tool_result",
}


def read_messages(body: JsonObject, drivers: CostDrivers) -> None:
    """/messages. Raises BadRequest or UnboundedCost."""
    drivers.limit_names = ("max_tokens",)
    refuse_foreign(body, "prompt", "input", "max_completion_tokens", "max_output_tokens", "n", "functions")
    refuse_unbounded(body, UNBOUNDED)
    _read_context_edits(body)
    _read_thinking(body)
    _read_schema(body, drivers)
    _read_blocks(body.get("system"), "system", SYSTEM_BLOCKS, drivers)
    messages = require_list(body, "messages", "message")
    drivers.allowance += MESSAGE_TOKENS * len(messages)
    for message in messages:
        if not isinstance(message, dict):
            raise wrong("messages", "a list of objects")
        _read_blocks(message.get("content"), "messages", BLOCKS, drivers)


def _read_schema(body: JsonObject, drivers: CostDrivers) -> None:
    # `output_format` is its name under the beta feature that passes (structured outputs).
    output_format = object_of(body.get("output_config"), "output_config").get("format")
    if output_format is not None or body.get("output_format") is not None:
        drivers.allowance += SCHEMA_TOKENS


def _read_context_edits(body: JsonObject) -> None:
    param = "context_management"
    for edit in list_of(object_of(body.get(param), param), "edits", f"{param}."):
        kind = edit.get("type") if isinstance(edit, dict) else None
        if not isinstance(kind, str) or kind not in CONTEXT_EDITS:
            known = ", ".join(sorted(CONTEXT_EDITS))
            raise UnboundedCost(f"One of the edits has no bound; these have: {known}.", param=param)


def _read_thinking(body: JsonObject) -> None:
    """Thinking is part of the output that `max_tokens` limits, as long as its budget is below that."""
    budget = integer(object_of(body.get("thinking"), "thinking"), "budget_tokens", None, "thinking.")
    limit = integer(body, "max_tokens")
    if budget is not None and (limit is None or budget >= limit):
        message = "`thinking.budget_tokens` must be below `max_tokens`."
        raise BadRequest(message, param="thinking.budget_tokens")


def _read_blocks(blocks: Json, param: str, known: frozenset[str], drivers: CostDrivers) -> None:
    if blocks is None or isinstance(blocks, str):
        return
    if not isinstance(blocks, list):
        raise wrong(param, "text or lists of content blocks")
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(block, dict) or not isinstance(kind, str):
            raise BadRequest("Every content block must be an object with a `type`.", param=param)
        if kind not in known:
            raise unknown_kind(kind, param)
        _read_block(kind, block, param, drivers)


def _read_block(kind: str, block: JsonObject, param: str, drivers: CostDrivers) -> None:
    if kind == "image":
        _read_source(block, param, drivers, is_image=True)
    elif kind == "document":
        _read_source(block, param, drivers, is_image=False)
    elif kind == "tool_result":
        _read_blocks(block.get("content"), param, RESULT_BLOCKS, drivers)
    elif kind == "search_result":
        _read_blocks(block.get("content"), param, SYSTEM_BLOCKS, drivers)
    elif kind == "web_search_tool_result":
        drivers.fills_context = True  # pages that only the provider can read


def _read_source(block: JsonObject, param: str, drivers: CostDrivers, *, is_image: bool) -> None:
    source = object_of(block.get("source"), param)
    kind = source.get("type")
    if kind == "content" and not is_image:
        _read_blocks(source.get("content"), param, SYSTEM_BLOCKS | {"image"}, drivers)
    elif kind in ("base64", "url"):
        drivers.images += is_image
        drivers.has_files = drivers.has_files or not is_image
        drivers.media_bytes += size_of(source.get("data")) if kind == "base64" else 0
    elif kind != "text" or is_image:
        raise unknown_kind(f"{block.get('type')} from {kind}", param)
