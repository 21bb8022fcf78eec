"""The body of OpenAI's Responses: its input items, and the fields of that endpoint alone.

Source: https://openrouter.ai/docs/api_reference/responses/overview, and OpenAI's Responses API for what the
items hold.
"""

from __future__ import annotations

from common.errors import UnboundedCost
from common.json_types import JsonObject
from gateway.pricing.cost_drivers import (
    MESSAGE_TOKENS,
    SCHEMA_TOKENS,
    CostDrivers,
    list_of,
    object_of,
    refuse_foreign,
    refuse_unbounded,
    wrong,
)
from gateway.pricing.readers.content_parts import read_parts, size_of, unknown_kind

STORED = "Nothing is stored here. Send the whole conversation in `input`."
UNBOUNDED = {
    "previous_response_id": STORED,
    "conversation": STORED,
    "prompt": "A stored prompt template can be of any length.",
    "context_management": "Compaction is billed beyond any output limit.",
}
# Items that hold nothing but the text that they show: calls of tools that the client runs.
TEXT_ITEMS = frozenset(("function_call", "custom_tool_call", "local_shell_call", "apply_patch_call"))
RESULT_ITEMS = (
    "function_call_output",
    "custom_tool_call_output",
    "local_shell_call_output",
    "apply_patch_call_output",
)
# Items with content parts, and the fields that hold them. Encrypted reasoning is as long as what it hides.
PARTS_OF_ITEMS = {
    "message": ("content",),
    "reasoning": ("content", "summary"),
    **dict.fromkeys(RESULT_ITEMS, ("output",)),
}
# Items that stand for what a tool of the upstream returned, which the body does not show.
HIDDEN_ITEMS = frozenset(("web_search_call", "openrouter:web_search", "openrouter:datetime"))


def read_responses(body: JsonObject, drivers: CostDrivers) -> None:
    """/responses. Raises BadRequest or UnboundedCost."""
    drivers.limit_names = ("max_output_tokens",)
    refuse_foreign(body, "messages", "max_tokens", "max_completion_tokens", "n")
    refuse_unbounded(body, UNBOUNDED)
    if body.get("background") not in (None, False):
        message = "A response in the background has no end at which it could be charged."
        raise UnboundedCost(message, param="background")
    if not isinstance(body.get("instructions"), str | None):
        raise wrong("instructions", "a string")
    if object_of(body.get("text"), "text").get("format") is not None:
        drivers.allowance += SCHEMA_TOKENS
    if not isinstance(body.get("input"), str):
        _read_items(body, drivers)


def _read_items(body: JsonObject, drivers: CostDrivers) -> None:
    if not body.get("input"):
        raise wrong("input", "a string or a list of at least one item")
    for item in list_of(body, "input"):
        if not isinstance(item, dict):
            raise wrong("input", "a list of objects")
        drivers.allowance += MESSAGE_TOKENS
        _read_item(item, drivers)


def _read_item(item: JsonObject, drivers: CostDrivers) -> None:
    kind = item.get("type", "message")
    if not isinstance(kind, str):
        raise unknown_kind(kind, "input")
    if kind == "message" and not isinstance(item.get("role"), str):
        raise unknown_kind("item_reference", "input")  # an item that is only an id stands for a stored one
    for name in PARTS_OF_ITEMS.get(kind, ()):
        read_parts(item.get(name), "input", drivers)
    if kind in HIDDEN_ITEMS:
        drivers.fills_context = True
    elif kind == "image_generation_call":
        drivers.images += 1
        drivers.media_bytes += size_of(item.get("result"))
    elif kind not in TEXT_ITEMS and kind not in PARTS_OF_ITEMS:
        raise unknown_kind(kind, "input")
