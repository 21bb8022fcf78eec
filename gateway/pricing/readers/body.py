"""Reads a body into CostDrivers: chat, completions, embeddings; dispatches the rest. Only what we bill or
route on is looked at.

It must refuse what has no bound, by the name of the field, and never raise anything but a GatewayError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from common.errors import UnboundedCost
from gateway.pricing.catalog import MAX_TOKENS
from gateway.pricing.cost_drivers import (
    LARGE_IMAGE_OUTPUT_TOKENS,
    MESSAGE_TOKENS,
    MODALITIES,
    SCHEMA_TOKENS,
    CostDrivers,
    integer,
    list_of,
    object_of,
    price_of,
    refuse_foreign,
    refuse_unbounded,
    wrong,
)
from gateway.pricing.readers.content_parts import read_part, read_parts
from gateway.pricing.readers.media import (
    read_image,
    read_rerank,
    read_speech,
    read_transcription,
    refuse_extras,
)
from gateway.pricing.readers.messages import read_messages
from gateway.pricing.readers.responses import read_responses
from gateway.pricing.readers.tools import read_plugins, read_tools

MAX_CHOICES = 128
CONVERSATIONS = frozenset(
    ("chat/completions", "responses", "messages")
)  # whose prompts show schemas and calls of tools
NUMBER_BYTES = 22  # the longest that a number is written

ANTHROPIC_TIERS = ("standard", "standard_only")
DEAR_TIERS = frozenset(("priority", "fast", "scale"))
UNBOUNDED_FIELDS = {
    "preset": "A preset can change the model and its limits, so its cost has no bound.",
    "prediction": "Rejected prediction tokens are billed beyond any output limit.",
    "web_search_options": 'Native searches have no limit. Use the plugin: `plugins: [{"id": "web"}]`.',
    "x_search_filter": 'Native searches have no limit. Use the plugin: `plugins: [{"id": "web"}]`.',
}


def read_body(
    endpoint: str, body: Mapping[str, Any], raw_size: int, suffixes: set[str], seconds: int | None = None
) -> CostDrivers:
    """What a body asks for, its models reached through these suffixes, its recording this long. Raises
    BadRequest or UnboundedCost.
    """
    ask = CostDrivers(raw_size, seconds=seconds)
    refuse_unbounded(body, UNBOUNDED_FIELDS)
    if not isinstance(body.get("user"), str | None):
        raise wrong("user", "a string")
    if not isinstance(body.get("stream"), bool | None) and endpoint != "audio/transcriptions":
        raise wrong("stream", "true or false")
    if endpoint in _MEDIA_READERS:
        refuse_extras(body, suffixes)
        _MEDIA_READERS[endpoint](body, ask)
    else:
        _TEXT_READERS[endpoint](body, ask)
        if endpoint in CONVERSATIONS:
            ask.allowance += _growth_of_numbers(body)
        _read_output(body, ask)
        read_tools(endpoint, body, ask)
        read_plugins(body, ask, suffixes)
    _read_tier(endpoint, body, ask, suffixes)
    _read_provider(body, ask)
    return ask


def _growth_of_numbers(body: Mapping[str, Any]) -> int:
    """The bytes that a body may grow by as its numbers are written anew: 1e20 becomes 21 digits, 1e-6 becomes
    0.000001.
    """
    grown = 0
    containers = [
        value for name, value in body.items() if name != "provider" and isinstance(value, dict | list)
    ]
    while containers:
        container = containers.pop()
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, float):
                grown += value.is_integer() or abs(value) < 0.01
            elif isinstance(value, dict | list):
                containers.append(value)
    return grown * NUMBER_BYTES


def _read_chat(body: Mapping[str, Any], ask: CostDrivers) -> None:
    refuse_foreign(body, "prompt")
    messages = list_of(body, "messages")
    if not messages:
        raise wrong("messages", "a list of at least one message")
    ask.allowance += MESSAGE_TOKENS * len(messages)
    for message in messages:
        _read_message(message, ask)
    ask.choices = integer(body, "n", MAX_CHOICES) or 1


def _read_completion(body: Mapping[str, Any], ask: CostDrivers) -> None:
    refuse_foreign(body, "messages")
    prompts = _read_inputs(body.get("prompt"), "prompt", ask)
    choices = max(integer(body, name, MAX_CHOICES) or 1 for name in ("n", "best_of"))
    ask.choices = choices * prompts  # every prompt of a list is answered


def _read_embedding(body: Mapping[str, Any], ask: CostDrivers) -> None:
    ask.has_output = False
    _read_inputs(body.get("input"), "input", ask)


_TEXT_READERS: Mapping[str, Callable[[Mapping[str, Any], CostDrivers], None]] = {
    "chat/completions": _read_chat,
    "completions": _read_completion,
    "embeddings": _read_embedding,
    "responses": read_responses,
    "messages": read_messages,
}
_MEDIA_READERS: Mapping[str, Callable[[Mapping[str, Any], CostDrivers], None]] = {
    "rerank": read_rerank,
    "images": read_image,
    "audio/speech": read_speech,
    "audio/transcriptions": read_transcription,
}


def _read_inputs(value: object, param: str, ask: CostDrivers) -> int:
    """Inputs of text, tokens or parts; returns how many there are (a list of tokens is one)."""
    if isinstance(value, list) and value:
        ask.inputs = 1 if _are_tokens(value) else len(value)
        for item in value:
            _read_input(item, param, ask)
    elif not isinstance(value, str):
        raise wrong(param, "a string or a list of at least one input")
    return ask.inputs


def _read_input(item: object, param: str, ask: CostDrivers) -> None:
    if isinstance(item, dict):
        read_parts(item.get("content"), param, ask)
        if "type" in item:
            read_part(item, param, ask)
    elif not (isinstance(item, str | int) or (isinstance(item, list) and _are_tokens(item))):
        raise wrong(param, "a string, or a list of strings or of tokens")


def _are_tokens(items: list[Any]) -> bool:
    return all(isinstance(item, int) for item in items)


def _read_message(message: object, ask: CostDrivers) -> None:
    if not isinstance(message, dict):
        raise wrong("messages", "a list of objects")
    if not isinstance(message.get("content"), str):
        read_parts(message.get("content"), "messages", ask)
    read_parts(message.get("images"), "messages", ask)
    ask.has_audio = ask.has_audio or message.get("audio") is not None
    for note in list_of(message, "annotations"):
        # What a file parser found earlier, images included.
        ask.has_files = ask.has_files or (isinstance(note, dict) and note.get("type") == "file")


def _read_output(body: Mapping[str, Any], ask: CostDrivers) -> None:
    if not ask.has_output:
        return
    for name in ask.limit_names:
        limit = integer(body, name)
        if limit is not None:
            ask.limits[name] = min(limit, MAX_TOKENS)
    if body.get("response_format") is not None:
        ask.allowance += SCHEMA_TOKENS
    if body.get("image_config") is not None:
        ask.image_tokens = LARGE_IMAGE_OUTPUT_TOKENS
    modalities = list_of(body, "modalities")
    if not all(isinstance(modality, str) for modality in modalities):
        raise wrong("modalities", "a list of strings")
    if not MODALITIES.issuperset(modalities):
        raise UnboundedCost("Only text, image and audio output have prices.", param="modalities")
    ask.modalities = frozenset(modalities) or None


def _read_tier(endpoint: str, body: Mapping[str, Any], ask: CostDrivers, suffixes: set[str]) -> None:
    """Keep to the default and flex tiers, whose prices are at most those held.

    Source: https://openrouter.ai/docs/guides/features/service-tiers
    """
    tier = body.get("service_tier")
    if tier not in (None, "default", "auto", "flex") and (
        endpoint != "messages" or tier not in ANTHROPIC_TIERS
    ):
        raise UnboundedCost("Only the default and flex service tiers have a bound.", param="service_tier")
    if (
        body.get("speed") not in (None, "standard") and endpoint != "audio/speech"
    ):  # there it is that of the voice
        raise UnboundedCost("A faster `speed` is billed at the price of the priority tier.", param="speed")
    if tier == "auto" or "nitro" in suffixes:
        # `auto` leaves the tier to the account, `:nitro` admits priority endpoints: unless the tier is named.
        ask.patch["service_tier"] = "default"


def _read_provider(body: Mapping[str, Any], ask: CostDrivers) -> None:
    ask.provider = object_of(body.get("provider"), "provider")
    if not ask.provider:
        return
    for param in ("order", "only"):
        for slug in list_of(ask.provider, param, "provider."):
            if not isinstance(slug, str):
                raise wrong(f"provider.{param}", "a list of strings")
            if DEAR_TIERS.intersection(slug.lower().split("/")[1:]):
                raise UnboundedCost("Endpoints of priority tiers have no bound.", param=f"provider.{param}")
    for name, value in object_of(ask.provider.get("max_price"), "provider.max_price").items():
        if value is not None:
            ask.own_max_price[name] = price_of(value, "provider.max_price")
