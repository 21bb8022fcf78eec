"""What does a request body ask for, as far as it costs money? Only what we bill or route on is looked at.

It must refuse what has no bound, by the name of the field, and never raise anything but a GatewayError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from catalog import LIMIT_FIELDS, MAX_TOKENS, Model
from errors import BadRequest, UnboundedCost
from money import parse_amount

MAX_CHOICES = 128
MAX_SEARCH_RESULTS = 25
DEFAULT_SEARCH_RESULTS = 5

# Tokens that the provider's side adds: templates and default system prompts; once and for each tool; for a schema.
REQUEST_TOKENS, MESSAGE_TOKENS, TOOLS_TOKENS, TOOL_TOKENS, SCHEMA_TOKENS = 256, 16, 1_024, 64, 1_024

TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal"))
IMAGE_PARTS = frozenset(("image_url", "input_image"))
FILE_PARTS = frozenset(("file", "input_file"))
MODALITIES = frozenset(("text", "image", "audio"))
HARMLESS_PLUGINS = frozenset(("response-healing", "context-compression", "moderation"))
SEARCH_ENGINES = frozenset(("exa", "parallel", "perplexity"))  # search once, at a documented price
PDF_ENGINES = frozenset(("native", "cloudflare-ai", "pdf-text"))  # without a fee per page
DEAR_TIERS = frozenset(("priority", "fast", "scale"))
UNBOUNDED_FIELDS = {
    "preset": "A preset can change the model and its limits, so its cost has no bound.",
    "prediction": "Rejected prediction tokens are billed beyond any output limit.",
    "web_search_options": 'Native searches have no limit. Use the plugin: `plugins: [{"id": "web"}]`.',
    "x_search_filter": 'Native searches have no limit. Use the plugin: `plugins: [{"id": "web"}]`.',
}


@dataclass(slots=True)
class Ask:
    """What a body asks for, as far as it costs money."""

    has_output: bool = True
    choices: int = 1
    inputs: int = 1
    allowance: int = REQUEST_TOKENS
    media_bytes: int = 0  # of the body, which are no text
    images: int = 0
    has_audio: bool = False
    has_files: bool = False
    pdf_engine: str | None = None
    search_results: int = 0
    modalities: frozenset[str] | None = None
    limits: dict[str, int] = field(default_factory=dict)
    provider: Mapping[str, Any] = field(default_factory=dict)
    own_max_price: dict[str, Decimal] = field(default_factory=dict)
    patch: dict[str, Any] = field(default_factory=dict)

    def outputs(self, model: Model) -> frozenset[str]:
        """The modalities that may come out: those asked for, else whatever the model can do."""
        if not self.has_output:
            return frozenset()
        return self.modalities if self.modalities is not None else model.output_modalities or MODALITIES


def read_body(endpoint: str, body: Mapping[str, Any], suffixes: set[str]) -> Ask:
    """What a body asks for, its models reached through these suffixes. Raises BadRequest or UnboundedCost."""
    ask = Ask()
    for param, why in UNBOUNDED_FIELDS.items():
        if body.get(param) is not None:
            raise UnboundedCost(why, param=param)
    for param, kind, must in (("stream", bool, "true or false"), ("user", str, "a string")):
        if not isinstance(body.get(param), kind | None):
            raise wrong(param, must)
    _READERS[endpoint](body, ask)
    _read_tier(body, ask, suffixes)
    _read_provider(body, ask)
    _read_tools(body, ask)
    _read_plugins(body, ask, suffixes)
    return ask


def _read_chat(body: Mapping[str, Any], ask: Ask) -> None:
    _refuse_other(body, "prompt")
    messages = list_of(body, "messages")
    if not messages:
        raise wrong("messages", "a list of at least one message")
    ask.allowance += MESSAGE_TOKENS * len(messages)
    for message in messages:
        _read_message(message, ask)
    _read_output(body, ask, _integer(body, "n", MAX_CHOICES) or 1)


def _read_completion(body: Mapping[str, Any], ask: Ask) -> None:
    _refuse_other(body, "messages")
    prompts = _read_inputs(body.get("prompt"), "prompt", ask)
    choices = max(_integer(body, name, MAX_CHOICES) or 1 for name in ("n", "best_of"))
    _read_output(body, ask, choices * prompts)  # every prompt of a list is answered


def _read_embedding(body: Mapping[str, Any], ask: Ask) -> None:
    ask.has_output = False
    _read_inputs(body.get("input"), "input", ask)


_READERS: Mapping[str, Callable[[Mapping[str, Any], Ask], None]] = {
    "chat/completions": _read_chat,
    "completions": _read_completion,
    "embeddings": _read_embedding,
}


def _refuse_other(body: Mapping[str, Any], param: str) -> None:
    if body.get(param) is not None:
        raise BadRequest(f"`{param}` does not belong to this endpoint.", param=param)


def _read_inputs(value: object, param: str, ask: Ask) -> int:
    """Inputs of text, tokens or parts; returns how many there are (a list of tokens is one)."""
    if isinstance(value, list) and value:
        ask.inputs = 1 if _are_tokens(value) else len(value)
        for item in value:
            _read_input(item, param, ask)
    elif not isinstance(value, str):
        raise wrong(param, "a string or a list of at least one input")
    return ask.inputs


def _read_input(item: object, param: str, ask: Ask) -> None:
    if isinstance(item, dict):
        _read_parts(item.get("content"), param, ask)
        if "type" in item:
            _read_part(item, param, ask)
    elif not (isinstance(item, str | int) or (isinstance(item, list) and _are_tokens(item))):
        raise wrong(param, "a string, or a list of strings or of tokens")


def _are_tokens(items: list[Any]) -> bool:
    return all(isinstance(item, int) for item in items)


def _read_message(message: object, ask: Ask) -> None:
    if not isinstance(message, dict):
        raise wrong("messages", "a list of objects")
    if not isinstance(message.get("content"), str):
        _read_parts(message.get("content"), "messages", ask)
    _read_parts(message.get("images"), "messages", ask)
    ask.has_audio = ask.has_audio or message.get("audio") is not None
    for note in list_of(message, "annotations"):
        # What a file parser found earlier, images included.
        ask.has_files = ask.has_files or (isinstance(note, dict) and note.get("type") == "file")


def _read_parts(parts: object, param: str, ask: Ask) -> None:
    if parts is None or isinstance(parts, str):
        return
    if not isinstance(parts, list):
        raise BadRequest("`content` must be a string or a list of parts.", param=param)
    for part in parts:
        _read_part(part, param, ask)


def _read_part(part: object, param: str, ask: Ask) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise BadRequest("Every content part must be an object with a `type`.", param=param)
    if kind in IMAGE_PARTS:
        ask.images += 1
        image = part.get("image_url")
        ask.media_bytes += _size(image.get("url") if isinstance(image, dict) else image, "data:image/")
    elif kind == "input_audio":
        ask.has_audio = True
        ask.media_bytes += _size(_object(part.get(kind), param).get("data"))
    elif kind in FILE_PARTS:
        ask.has_files = True
        ask.media_bytes += _size(_object(part.get("file"), param).get("file_data"))
    elif kind not in TEXT_PARTS:
        raise UnboundedCost(f"No price is known for content of type {kind[:40]!r}.", param=param)


def _size(data: object, prefix: str = "") -> int:
    return len(data) if isinstance(data, str) and data.startswith(prefix) else 0


def _read_output(body: Mapping[str, Any], ask: Ask, choices: int) -> None:
    ask.choices = choices
    for name in sorted(LIMIT_FIELDS):
        limit = _integer(body, name)
        if limit is not None:
            ask.limits[name] = min(limit, MAX_TOKENS)
    if body.get("response_format") is not None:
        ask.allowance += SCHEMA_TOKENS
    modalities = list_of(body, "modalities")
    if not all(isinstance(modality, str) for modality in modalities):
        raise wrong("modalities", "a list of strings")
    if not MODALITIES.issuperset(modalities):
        raise UnboundedCost("Only text, image and audio output have prices.", param="modalities")
    ask.modalities = frozenset(modalities) or None


def _read_tier(body: Mapping[str, Any], ask: Ask, suffixes: set[str]) -> None:
    """Keep to the default and flex tiers, whose prices are at most those held.

    Source: https://openrouter.ai/docs/guides/features/service-tiers
    """
    tier = body.get("service_tier")
    if tier not in (None, "default", "auto", "flex"):
        raise UnboundedCost("Only the default and flex service tiers have a bound.", param="service_tier")
    if body.get("speed") not in (None, "standard"):
        raise UnboundedCost("A faster `speed` is billed at the price of the priority tier.", param="speed")
    if tier == "auto" or "nitro" in suffixes:
        # `auto` leaves the tier to the account, `:nitro` admits priority endpoints: unless the tier is named.
        ask.patch["service_tier"] = "default"


def _read_provider(body: Mapping[str, Any], ask: Ask) -> None:
    ask.provider = _object(body.get("provider"), "provider")
    for param in ("order", "only"):
        for slug in list_of(ask.provider, param, "provider."):
            if not isinstance(slug, str):
                raise wrong(f"provider.{param}", "a list of strings")
            if DEAR_TIERS.intersection(slug.lower().split("/")[1:]):
                raise UnboundedCost("Endpoints of priority tiers have no bound.", param=f"provider.{param}")
    for name, value in _object(ask.provider.get("max_price"), "provider.max_price").items():
        if value is not None:
            ask.own_max_price[name] = _price_limit(value)


def _price_limit(value: object) -> Decimal:
    """A client's price limit. The range spares us and the upstream numbers of a million digits."""
    amount = parse_amount(repr(value) if isinstance(value, float) else value)
    if amount is None or (amount and not -30 < amount.adjusted() < 30):
        raise wrong("provider.max_price", "an object of prices: zero, or numbers between 1e-29 and 1e29")
    return amount


def _read_tools(body: Mapping[str, Any], ask: Ask) -> None:
    tools = list_of(body, "tools")
    for tool in tools:
        if not isinstance(tool, dict):
            raise wrong("tools", "a list of objects")
        if tool.get("type") != "function":
            raise UnboundedCost("Only tools of type `function` have a bound; server tools have none.", param="tools")
    tools = [*tools, *list_of(body, "functions")]
    if tools:
        ask.allowance += TOOLS_TOKENS + TOOL_TOKENS * len(tools)


def _read_plugins(body: Mapping[str, Any], ask: Ask, suffixes: set[str]) -> None:
    plugins = [_object(plugin, "plugins") for plugin in list_of(body, "plugins")]
    sent = [_read_plugin(plugin, ask) if plugin.get("enabled") is not False else plugin for plugin in plugins]
    if "online" in suffixes and not ask.search_results:
        sent.append(_read_search({"id": "web"}, ask))
    if ask.search_results:
        ask.patch["plugins"] = sent
    if ask.has_files and ask.pdf_engine is None:
        hint = '`plugins: [{"id": "file-parser", "pdf": {"engine": "cloudflare-ai"}}]`, or the engine "native"'
        raise UnboundedCost(f"Files may be billed by the page. Choose a parser without a fee: {hint}.", param="plugins")


def _read_plugin(plugin: Mapping[str, Any], ask: Ask) -> Mapping[str, Any]:
    """The plugin as it is sent: a web search gets an engine that searches once, where the client named none."""
    kind = plugin.get("id")
    if kind == "web":
        return _read_search(plugin, ask)
    if kind == "file-parser":
        ask.pdf_engine = _choice(_object(plugin.get("pdf"), "plugins").get("engine"), PDF_ENGINES, "A PDF engine")
    elif not isinstance(kind, str) or kind not in HARMLESS_PLUGINS:
        raise UnboundedCost("One of the plugins has no bound.", param="plugins")
    return plugin


def _read_search(plugin: Mapping[str, Any], ask: Ask) -> Mapping[str, Any]:
    engine = plugin.get("engine")
    named = "exa" if engine in (None, "auto") else _choice(engine, SEARCH_ENGINES, "A search engine")
    if plugin.get("x_search") is not None:
        raise UnboundedCost("Searches on X are billed by the item, without a limit.", param="plugins")
    results = _integer(plugin, "max_results", MAX_SEARCH_RESULTS, "plugins.") or DEFAULT_SEARCH_RESULTS
    ask.search_results += results
    return {**plugin, "engine": named}


def _choice(value: object, known: frozenset[str], what: str) -> str:
    if not isinstance(value, str) or value not in known:
        raise UnboundedCost(f"{what} must be one of {', '.join(sorted(known))}: others have no bound.", param="plugins")
    return value


def wrong(param: str, must: str) -> BadRequest:
    return BadRequest(f"`{param}` must be {must}.", param=param)


def list_of(body: Mapping[str, Any], name: str, prefix: str = "") -> list[Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, list):
        raise wrong(prefix + name, "a list")
    return value or []


def _object(value: object, param: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise wrong(param, "an object" if param != "plugins" else "a list of objects")
    return value or {}


def _integer(body: Mapping[str, Any], name: str, high: int | None = None, prefix: str = "") -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (high is not None and value > high):
        raise wrong(prefix + name, f"an integer from 1 to {high}" if high else "an integer of at least 1")
    return value
