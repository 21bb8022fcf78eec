"""The most that one model can charge for a body: its rates at the dearest, its prompt and its searches.

A router has no prices of its own: it is held at those that the client's `provider.max_price` lets through,
and at what can lie beyond them by the markups of the model list. A model without a price must be refused,
never taken for free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

from common.errors import Forbidden, ModelNotFound, UnboundedCost
from common.money import EXACT
from gateway.pricing.catalog import Model, ModelIndex
from gateway.pricing.cost_drivers import CostDrivers, list_of
from gateway.pricing.prices import ZERO, Price, Rates, search_nanos

SELF_SEARCHES = 5  # what a model that searches by itself is held for: nothing documents its maximum
# Models whose own search keeps to `max_uses`:
# https://openrouter.ai/docs/guides/features/server-tools/web-search
NATIVE_SEARCHERS = "anthropic/"
ROUTED_ENDPOINTS = frozenset(("chat/completions", "responses"))

# Of a second of sound: one for every 10 ms, the finest step in which an encoder listens. Documented are 10
# (OpenAI) to 32 (Gemini).
AUDIO_TOKENS = 100

# The most that is documented for one image: gpt-4o-mini, 2,833 + 8 tiles of 5,667.
IMAGE_TOKENS = 48_169


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that the body can reach, and the dearest that it can charge for this body."""

    model: Model
    rates: Rates
    prompt_tokens: int
    search_nanos: Decimal
    max_output: int | None  # tokens of one choice; None: unknown
    makes_images: bool = False  # without being asked for one


def price_candidate(
    endpoint: str,
    name: str,
    drivers: CostDrivers,
    models: ModelIndex,
    *,
    more_suffixes: frozenset[str],
    free_models: bool,
) -> Candidate:
    """What the model of this name can charge. Raises ModelNotFound, UnboundedCost, or Forbidden (it is free,
    and free models are off).
    """
    model = _require_model(models.resolve(name, more_suffixes=more_suffixes), name)
    if model.is_router and endpoint in ROUTED_ENDPOINTS and drivers.client_caps:
        return _price_router(model, drivers, models)
    price = _require_price(endpoint, name, model)
    _refuse_unbounded_search(model, drivers)
    prompt_tokens = _prompt_tokens(model, drivers, searches=model.searches)
    rates = _rates(model, price, prompt_tokens, drivers)
    if not drivers.is_text:
        _require_any_price(endpoint, model, rates, drivers)
    if not free_models and _is_free(model, rates, drivers):
        message = (
            f"{name!r} costs nothing, and free models are switched off on this gateway. Use a priced one."
        )
        raise Forbidden(message, param="model", code="free_models_disabled")
    searches = _search_nanos(rates, drivers, rates.web_search if model.searches else ZERO)
    output = _max_output(model, rates, drivers)
    return Candidate(model, rates, prompt_tokens, searches, output, _makes_images(model, drivers))


def _require_model(model: Model | None, name: str) -> Model:
    if model is None:
        message = f"The model {name!r} does not exist. GET /v1/models lists those that do."
        raise ModelNotFound(message, param="model")
    return model


def _require_price(endpoint: str, name: str, model: Model) -> Price:
    if model.price is not None and not model.id.endswith(":batch"):
        return model.price
    if model.is_router and endpoint in ROUTED_ENDPOINTS:
        message = f"{name!r} needs `provider.max_price` with `prompt` and `completion` to have a bound."
    else:
        message = f"{name!r} has no fixed price here (routers and batch models have none)."
    raise UnboundedCost(message, param="model")


def _refuse_unbounded_search(model: Model, drivers: CostDrivers) -> None:
    if drivers.native_turns and not model.id.startswith(NATIVE_SEARCHERS):
        message = f"The search of {model.id!r} ignores `max_uses`. Use `openrouter:web_search`."
        raise UnboundedCost(message, param="tools")


def _is_free(model: Model, rates: Rates, drivers: CostDrivers) -> bool:
    """Whether the model itself charges nothing for this body. The fee of a search plugin does not make it a
    priced one.
    """
    fees = (
        rates.request,
        rates.image if drivers.images or drivers.made_images else ZERO,
        rates.web_search if model.searches else ZERO,
    )
    return not any((rates.input, rates.output, *fees))


# How much input a model can count.


def _prompt_tokens(model: Model, drivers: CostDrivers, *, searches: bool) -> int:
    """The most units of input that this model can count: tokens, at some endpoints characters or seconds."""
    if not drivers.is_text and not drivers.has_audio:
        # The context length does not count here. A provider may make each image on its own.
        return _visible_tokens(drivers) * max(1, drivers.made_images)
    context = model.context_length
    if drivers.seconds is not None:
        return max(drivers.least_input, _within(context, _heard_tokens(drivers, drivers.seconds)))
    if not drivers.is_hidden and not searches:
        return _within(None if context is None else context * drivers.inputs, _visible_tokens(drivers))
    if context is None:
        return _unknown_context(model, drivers)
    return max(context * drivers.inputs, drivers.least_input)


def _visible_tokens(drivers: CostDrivers) -> int:
    text = max(0, drivers.raw_size - drivers.media_bytes)
    return text + drivers.images * IMAGE_TOKENS + drivers.allowance


def _heard_tokens(drivers: CostDrivers, seconds: int) -> int:
    return seconds * AUDIO_TOKENS + max(0, drivers.raw_size - drivers.media_bytes) + drivers.allowance


def _within(context: int | None, tokens: int) -> int:
    return tokens if context is None else min(tokens, context)


def _unknown_context(model: Model, drivers: CostDrivers) -> int:
    """Zero where only the request has a price. Raises UnboundedCost elsewhere."""
    rates = None if model.price is None else model.price.dearest
    if not drivers.is_text and rates is not None and not rates.input and not rates.audio:
        return 0
    message = f"{model.id!r} has no known context length to bound files, audio and searches."
    raise UnboundedCost(message, param="model")


# At which rates.


def _rates(model: Model, price: Price, prompt_tokens: int, drivers: CostDrivers) -> Rates:
    """The model's rates for this body: `input` and `output` are the dearest of text and of its media."""
    rates, outputs = price.rates_for(prompt_tokens), drivers.outputs(model)
    is_plain = drivers.is_text and not drivers.has_media and outputs <= {"text"}
    if price.unknown_features and not (is_plain and not drivers.search_results and not drivers.tool_steps):
        message = f"{model.id!r} has prices for media or searches that are not known here."
        raise UnboundedCost(message, param="model")
    if is_plain and drivers.has_output:
        return rates
    return replace(
        rates, input=_input_rate(rates, model, drivers), output=_output_rate(rates, model, drivers, outputs)
    )


def _input_rate(rates: Rates, model: Model, drivers: CostDrivers) -> Decimal:
    rate = max(rates.input, rates.image_token) if drivers.has_media else rates.input
    return max(rate, _audio_rate(rates, model, drivers)) if drivers.has_audio else rate


def _audio_rate(rates: Rates, model: Model, drivers: CostDrivers) -> Decimal:
    if not drivers.is_text:
        return rates.audio or ZERO  # a model that only reads recordings prices them as its prompt
    return _require_rate(rates.audio, model, "audio input", "messages")


def _output_rate(rates: Rates, model: Model, drivers: CostDrivers, outputs: frozenset[str]) -> Decimal:
    dear_rate = rates.output if drivers.has_output else ZERO
    for modality, rate in (("image", rates.image_output), ("audio", rates.audio_output)):
        if modality not in outputs:
            continue
        if not drivers.is_text:
            dear_rate = max(dear_rate, rate or ZERO)
        elif rate is not None or drivers.modalities or model.output_modalities:
            dear_rate = max(dear_rate, _require_rate(rate, model, f"{modality} output", "modalities"))
    return dear_rate


def _require_rate(rate: Decimal | None, model: Model, what: str, param: str) -> Decimal:
    if rate is None:
        raise UnboundedCost(f"{model.id!r} names no price for {what}.", param=param)
    return rate


def _require_any_price(endpoint: str, model: Model, rates: Rates, drivers: CostDrivers) -> None:
    """A model of media or ranking that names no price for its work is billed in units that the list does not
    show.
    """
    priced: Mapping[str, tuple[Decimal, ...]] = {
        "images": (rates.output, rates.request, rates.image),
        "audio/speech": (rates.input, rates.output, rates.request),
        "audio/transcriptions": (rates.input, rates.request),
        "rerank": (rates.input, rates.request),
    }
    if not any(priced[endpoint]) and not model.id.endswith(":free"):
        raise UnboundedCost(f"{model.id!r} names no price that bounds this request.", param="model")


# What comes out, and what is searched for.


def _max_output(model: Model, rates: Rates, drivers: CostDrivers) -> int | None:
    """The longest output: what the model can write; where images are asked for, no less than one of them."""
    if not drivers.is_text and not rates.output:
        return 0
    if drivers.made_images and model.max_output is not None:
        return max(model.max_output, drivers.image_tokens)
    return model.max_output


def _makes_images(model: Model, drivers: CostDrivers) -> bool:
    able = model.output_modalities or drivers.modalities or frozenset()
    return "image" in able and not drivers.made_images and "image" in drivers.outputs(model)


def _search_nanos(rates: Rates, drivers: CostDrivers, own_fee: Decimal) -> Decimal:
    """Nano-dollars of all searches: those that the model makes by itself, the plugin's and the tools'."""
    nanos = EXACT.multiply(own_fee, Decimal(SELF_SEARCHES))
    if drivers.search_results:
        nanos = EXACT.add(nanos, search_nanos(rates, drivers.search_results))
    if drivers.tool_searches:
        each = search_nanos(rates, drivers.tool_results)
        nanos = EXACT.add(nanos, EXACT.multiply(each, Decimal(drivers.tool_searches)))
    return nanos


# The router.


def _price_router(model: Model, drivers: CostDrivers, models: ModelIndex) -> Candidate:
    _require_router_caps(model, drivers)
    caps = drivers.client_caps
    rates = models.markups.rates(
        # Caps are dollars: of a million tokens, of a request, of an image.
        prompt=caps["prompt"].scaleb(3, EXACT),
        completion=caps["completion"].scaleb(3, EXACT),
        request=caps.get("request", ZERO).scaleb(9, EXACT),
        image=caps.get("image", ZERO).scaleb(9, EXACT),
    )
    _restrict_router(drivers, models)
    tokens = _prompt_tokens(model, drivers, searches=False)
    return Candidate(model, rates, tokens, _search_nanos(rates, drivers, ZERO), model.max_output)


def _require_router_caps(model: Model, drivers: CostDrivers) -> None:
    for name in ("prompt", "completion", *(("image",) if drivers.images else ())):
        if name not in drivers.client_caps:
            message = f"{model.id!r} needs `provider.max_price.{name}` to have a bound."
            raise UnboundedCost(message, param="provider.max_price")
    if drivers.has_audio or (drivers.modalities is not None and drivers.modalities != {"text"}):
        raise UnboundedCost(f"{model.id!r} has a bound for text, images and files only.", param="model")
    if model.context_length is None:
        raise UnboundedCost(f"{model.id!r} has no known context length.", param="model")


def _restrict_router(drivers: CostDrivers, models: ModelIndex) -> None:
    """Keeps the router to endpoints that know output limits (others would ignore them), and off models that
    no price cap bounds.

    Source: https://openrouter.ai/docs/guides/routing/routers/auto-router
    """
    routing = {**(drivers.routing or {}), "id": "auto-router", "enabled": True}
    excluded = list_of(routing, "excluded_models", "plugins.")
    drivers.patch["plugins"] = [
        *drivers.plugins,
        {**routing, "excluded_models": [*excluded, *models.uncapped]},
    ]
    drivers.provider = {**drivers.provider, "require_parameters": True}
