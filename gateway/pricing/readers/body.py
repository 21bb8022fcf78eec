"""Reads a request body into CostDrivers: chat, completions and embeddings here, the other endpoints in their
own modules. Only what the gateway bills or routes on is looked at.

A body that has no bound must be refused by the name of the field, and nothing but a GatewayError may be
raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from common.errors import UnboundedCost
from common.json_types import Json, JsonObject
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
    require_list,
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

Reader: TypeAlias = Callable[[JsonObject, CostDrivers], None]

MAX_CHOICES = 128
# Endpoints whose prompts show schemas and calls of tools, and so the numbers in them.
CONVERSATIONS = frozenset(("chat/completions", "responses", "messages"))
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
    endpoint: str, body: JsonObject, raw_size: int, suffixes: set[str], seconds: int | None = None
) -> CostDrivers:
    """What a body of `raw_size` bytes asks for, whose models have these suffixes and whose recording lasts so
    long. Raises BadRequest or UnboundedCost.
    """
    drivers = CostDrivers(raw_size, seconds=seconds)
    refuse_unbounded(body, UNBOUNDED_FIELDS)
    if not isinstance(body.get("user"), str | None):
        raise wrong("user", "a string")
    if not isinstance(body.get("stream"), bool | None) and endpoint != "audio/transcriptions":
        raise wrong("stream", "true or false")
    if endpoint in _MEDIA_READERS:
        refuse_extras(body, suffixes)
        _MEDIA_READERS[endpoint](body, drivers)
    else:
        _read_text_body(endpoint, body, drivers, suffixes)
    _read_tier(endpoint, body, drivers, suffixes)
    _read_provider(body, drivers)
    return drivers


def _read_text_body(endpoint: str, body: JsonObject, drivers: CostDrivers, suffixes: set[str]) -> None:
    _TEXT_READERS[endpoint](body, drivers)
    if endpoint in CONVERSATIONS:
        drivers.allowance += _growth_of_numbers(body)
    if drivers.has_output:
        _read_output(body, drivers)
    read_tools(endpoint, body, drivers)
    read_plugins(body, drivers, suffixes)


def _growth_of_numbers(body: JsonObject) -> int:
    """The bytes by which a body may grow as its numbers are written anew: 1e20 becomes 21 digits, 1e-6
    becomes 0.000001.
    """
    grown = 0
    # A loop and not a recursion: a body may be nested deeper than the interpreter's stack.
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


def _read_chat(body: JsonObject, drivers: CostDrivers) -> None:
    refuse_foreign(body, "prompt")
    messages = require_list(body, "messages", "message")
    drivers.allowance += MESSAGE_TOKENS * len(messages)
    for message in messages:
        _read_message(message, drivers)
    drivers.choices = integer(body, "n", MAX_CHOICES) or 1


def _read_completion(body: JsonObject, drivers: CostDrivers) -> None:
    refuse_foreign(body, "messages")
    prompts = _read_inputs(body.get("prompt"), "prompt", drivers)
    choices = max(integer(body, name, MAX_CHOICES) or 1 for name in ("n", "best_of"))
    drivers.choices = choices * prompts  # every prompt of a list is answered


def _read_embedding(body: JsonObject, drivers: CostDrivers) -> None:
    drivers.has_output = False
    _read_inputs(body.get("input"), "input", drivers)


_TEXT_READERS: Mapping[str, Reader] = {
    "chat/completions": _read_chat,
    "completions": _read_completion,
    "embeddings": _read_embedding,
    "responses": read_responses,
    "messages": read_messages,
}
_MEDIA_READERS: Mapping[str, Reader] = {
    "rerank": read_rerank,
    "images": read_image,
    "audio/speech": read_speech,
    "audio/transcriptions": read_transcription,
}


def _read_inputs(value: Json, param: str, drivers: CostDrivers) -> int:
    """Reads inputs of text, tokens or parts, and returns how many there are (a list of tokens is one)."""
    if isinstance(value, list) and value:
        drivers.inputs = 1 if _are_tokens(value) else len(value)
        for item in value:
            _read_input(item, param, drivers)
    elif not isinstance(value, str):
        raise wrong(param, "a string or a list of at least one input")
    return drivers.inputs


def _read_input(item: Json, param: str, drivers: CostDrivers) -> None:
    if isinstance(item, dict):
        read_parts(item.get("content"), param, drivers)
        if "type" in item:
            read_part(item, param, drivers)
    elif not (isinstance(item, str | int) or (isinstance(item, list) and _are_tokens(item))):
        raise wrong(param, "a string, or a list of strings or of tokens")


def _are_tokens(items: list[Json]) -> bool:
    return all(isinstance(item, int) for item in items)


def _read_message(message: Json, drivers: CostDrivers) -> None:
    if not isinstance(message, dict):
        raise wrong("messages", "a list of objects")
    if not isinstance(message.get("content"), str):
        read_parts(message.get("content"), "messages", drivers)
    read_parts(message.get("images"), "messages", drivers)
    drivers.has_audio = drivers.has_audio or message.get("audio") is not None
    for annotation in list_of(message, "annotations"):
        # What a file parser read earlier, images included.
        is_file = isinstance(annotation, dict) and annotation.get("type") == "file"
        drivers.has_files = drivers.has_files or is_file


def _read_output(body: JsonObject, drivers: CostDrivers) -> None:
    for name in drivers.limit_names:
        limit = integer(body, name)
        if limit is not None:
            drivers.limits[name] = min(limit, MAX_TOKENS)
    if body.get("response_format") is not None:
        drivers.allowance += SCHEMA_TOKENS
    if body.get("image_config") is not None:
        drivers.image_tokens = LARGE_IMAGE_OUTPUT_TOKENS
    drivers.modalities = frozenset(_read_modalities(body)) or None


def _read_modalities(body: JsonObject) -> list[str]:
    modalities = list_of(body, "modalities")
    names = [modality for modality in modalities if isinstance(modality, str)]
    if len(names) < len(modalities):
        raise wrong("modalities", "a list of strings")
    if not MODALITIES.issuperset(names):
        raise UnboundedCost("Only text, image and audio output have prices.", param="modalities")
    return names


def _read_tier(endpoint: str, body: JsonObject, drivers: CostDrivers, suffixes: set[str]) -> None:
    """Keeps to the default and flex tiers, whose prices are at most those that are held.

    Source: https://openrouter.ai/docs/guides/features/service-tiers
    """
    tier, speed = body.get("service_tier"), body.get("speed")
    is_anthropic = endpoint == "messages" and tier in ANTHROPIC_TIERS
    if tier not in (None, "default", "auto", "flex") and not is_anthropic:
        raise UnboundedCost("Only the default and flex service tiers have a bound.", param="service_tier")
    if speed not in (None, "standard") and endpoint != "audio/speech":  # there it is that of the voice
        raise UnboundedCost("A faster `speed` is billed at the price of the priority tier.", param="speed")
    if tier == "auto" or "nitro" in suffixes:
        # `auto` leaves the tier to the account, and `:nitro` admits priority endpoints, unless the tier is
        # named.
        drivers.patch["service_tier"] = "default"


def _read_provider(body: JsonObject, drivers: CostDrivers) -> None:
    drivers.provider = provider = object_of(body.get("provider"), "provider")
    if not provider:
        return
    for param in ("order", "only"):
        for slug in list_of(provider, param, "provider."):
            _refuse_dear_tier(slug, f"provider.{param}")
    for name, value in object_of(provider.get("max_price"), "provider.max_price").items():
        if value is not None:
            drivers.client_caps[name] = price_of(value, "provider.max_price")


def _refuse_dear_tier(slug: Json, param: str) -> None:
    if not isinstance(slug, str):
        raise wrong(param, "a list of strings")
    if DEAR_TIERS.intersection(slug.lower().split("/")[1:]):
        raise UnboundedCost("Endpoints of priority tiers have no bound.", param=param)
