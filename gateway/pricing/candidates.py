"""What one candidate model can charge for a body. Its rates for this body at the dearest, its prompt and its
searches.

A router has no prices of its own: it is held at those that the client's `provider.max_price` lets through,
and what lies beyond them, by the markups of the model list. Whatever has no price is refused, and never taken
for free.
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
# Whose own search keeps to `max_uses`: https://openrouter.ai/docs/guides/features/server-tools/web-search
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
    max_output: int | None  # tokens of one choice
    makes_images: bool = False  # unasked


def price_candidate(
    endpoint: str,
    name: str,
    ask: CostDrivers,
    models: ModelIndex,
    *,
    more_suffixes: frozenset[str],
    free_models: bool,
) -> Candidate:
    """What the model of this name can charge. Raises ModelNotFound, UnboundedCost, or Forbidden (it is free,
    and those are off).
    """
    model = models.resolve(name, more_suffixes=more_suffixes)
    if model is None:
        raise ModelNotFound(
            f"The model {name!r} does not exist. GET /v1/models lists those that do.", param="model"
        )
    if model.is_router and endpoint in ROUTED_ENDPOINTS and ask.own_max_price:
        return _reach_router(model, ask, models)
    if model.price is None or model.id.endswith(":batch"):
        raise UnboundedCost(_no_price(name, model, endpoint), param="model")
    if ask.native_turns and not model.id.startswith(NATIVE_SEARCHERS):
        raise UnboundedCost(
            f"The search of {model.id!r} ignores `max_uses`. Use `openrouter:web_search`.", param="tools"
        )
    prompt_tokens = _prompt_tokens(model, ask, searches=model.searches)
    rates = _rates(model, model.price, prompt_tokens, ask)
    if not ask.is_text:
        _require_any_price(endpoint, model, rates, ask)
    if not free_models and _is_free(model, rates, ask):
        message = (
            f"{name!r} costs nothing, and free models are switched off on this gateway. Use a priced one."
        )
        raise Forbidden(message, param="model", code="free_models_disabled")
    searches = _search_nanos(rates, ask, rates.web_search if model.searches else ZERO)
    return Candidate(
        model, rates, prompt_tokens, searches, _max_output(model, rates, ask), _makes_images(model, ask)
    )


def _no_price(name: str, model: Model, endpoint: str) -> str:
    if model.is_router and endpoint in ROUTED_ENDPOINTS:
        return f"{name!r} needs `provider.max_price` with `prompt` and `completion` to have a bound."
    return f"{name!r} has no fixed price here (routers and batch models have none)."


def _is_free(model: Model, rates: Rates, ask: CostDrivers) -> bool:
    """Whether the model itself asks nothing for this body. The fee of a search plugin does not make it a
    priced one.
    """
    fees = (
        rates.request,
        rates.image if ask.images or ask.made_images else ZERO,
        rates.web_search if model.searches else ZERO,
    )
    return not any((rates.input, rates.output, *fees))


def _prompt_tokens(model: Model, ask: CostDrivers, *, searches: bool) -> int:
    """The most units of input that this model can count: tokens, at some endpoints characters or seconds."""
    context = model.context_length
    if not ask.is_text and not ask.has_audio:
        tokens = ask.raw_size - min(ask.raw_size, ask.media_bytes) + ask.images * IMAGE_TOKENS + ask.allowance
        return tokens * max(1, ask.made_images)  # a provider may make each image on its own
    if ask.seconds is not None:
        heard = ask.seconds * AUDIO_TOKENS + max(0, ask.raw_size - ask.media_bytes) + ask.allowance
        return max(ask.least_input, heard if context is None else min(heard, context))
    if ask.is_hidden or searches:
        if context is None:
            return _unknown_context(model, ask)
        return max(context * ask.inputs, ask.least_input)
    tokens = max(0, ask.raw_size - ask.media_bytes) + ask.images * IMAGE_TOKENS + ask.allowance
    return tokens if context is None else min(tokens, context * ask.inputs)


def _unknown_context(model: Model, ask: CostDrivers) -> int:
    dearest = (
        None if model.price is None else model.price.tiers[-1][1] if model.price.tiers else model.price.base
    )
    if not ask.is_text and dearest is not None and not dearest.input and not dearest.audio:
        return 0  # only the request has a price
    raise UnboundedCost(
        f"{model.id!r} has no known context length to bound files, audio and searches.", param="model"
    )


def _rates(model: Model, price: Price, prompt_tokens: int, ask: CostDrivers) -> Rates:
    """The model's rates for this body: `input` and `output` are the dearest of text and of the media it uses."""
    found, outputs = price.rates_for(prompt_tokens), ask.outputs(model)
    media_out = outputs - {"text"}
    is_plain = ask.is_text and not ask.has_media and not media_out
    if price.unknown_features and not (is_plain and not ask.search_results and not ask.tool_steps):
        raise UnboundedCost(
            f"{model.id!r} has prices for media or searches that are not known here.", param="model"
        )
    if is_plain and ask.has_output:
        return found
    dear_input = max(found.input, found.image_token) if ask.has_media else found.input
    if ask.has_audio:
        dear_input = max(dear_input, _audio_rate(found, model, ask))
    return replace(found, input=dear_input, output=_output_rate(found, model, ask, outputs))


def _audio_rate(found: Rates, model: Model, ask: CostDrivers) -> Decimal:
    if not ask.is_text:
        return found.audio or ZERO  # a model that only reads recordings prices them as its prompt
    return _require(found.audio, model, "audio input", "messages")


def _output_rate(found: Rates, model: Model, ask: CostDrivers, outputs: frozenset[str]) -> Decimal:
    dear_output = found.output if ask.has_output else ZERO
    for modality, rate in (("image", found.image_output), ("audio", found.audio_output)):
        if modality not in outputs:
            continue
        if not ask.is_text:
            dear_output = max(dear_output, rate or ZERO)
        elif rate is not None or ask.modalities or model.output_modalities:
            dear_output = max(dear_output, _require(rate, model, f"{modality} output", "modalities"))
    return dear_output


def _require(rate: Decimal | None, model: Model, what: str, param: str) -> Decimal:
    if rate is None:
        raise UnboundedCost(f"{model.id!r} names no price for {what}.", param=param)
    return rate


def _require_any_price(endpoint: str, model: Model, rates: Rates, ask: CostDrivers) -> None:
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


def _max_output(model: Model, rates: Rates, ask: CostDrivers) -> int | None:
    """The longest output: what the model can write, and where images are asked for, no less than one of them."""
    if not ask.is_text and not rates.output:
        return 0
    if ask.made_images and model.max_output is not None:
        return max(model.max_output, ask.image_tokens)
    return model.max_output


def _makes_images(model: Model, ask: CostDrivers) -> bool:
    able = model.output_modalities or ask.modalities or frozenset()
    return "image" in able and not ask.made_images and "image" in ask.outputs(model)


def _search_nanos(rates: Rates, ask: CostDrivers, own_fee: Decimal) -> Decimal:
    nanos = EXACT.multiply(own_fee, Decimal(SELF_SEARCHES))
    if ask.search_results:
        nanos = EXACT.add(nanos, search_nanos(rates, ask.search_results))
    if ask.tool_searches:
        nanos = EXACT.add(
            nanos, EXACT.multiply(search_nanos(rates, ask.tool_results), Decimal(ask.tool_searches))
        )
    return nanos


# The router.


def _reach_router(model: Model, ask: CostDrivers, models: ModelIndex) -> Candidate:
    own = ask.own_max_price
    for name in ("prompt", "completion", *(("image",) if ask.images else ())):
        if name not in own:
            raise UnboundedCost(
                f"{model.id!r} needs `provider.max_price.{name}` to have a bound.", param="provider.max_price"
            )
    if ask.has_audio or (ask.modalities is not None and ask.modalities != {"text"}):
        raise UnboundedCost(f"{model.id!r} has a bound for text, images and files only.", param="model")
    if model.context_length is None:
        raise UnboundedCost(f"{model.id!r} has no known context length.", param="model")
    rates = models.markups.rates(
        prompt=own["prompt"].scaleb(3, EXACT),
        completion=own["completion"].scaleb(3, EXACT),
        request=own.get("request", ZERO).scaleb(9, EXACT),
        image=own.get("image", ZERO).scaleb(9, EXACT),
    )
    _restrict(ask, models)
    return Candidate(
        model,
        rates,
        _prompt_tokens(model, ask, searches=False),
        _search_nanos(rates, ask, ZERO),
        model.max_output,
    )


def _restrict(ask: CostDrivers, models: ModelIndex) -> None:
    """Keep the router to endpoints that know output limits (others would ignore them), and off models beyond
    any cap.

    Source: https://openrouter.ai/docs/guides/routing/routers/auto-router
    """
    routing = {**(ask.routing or {}), "id": "auto-router", "enabled": True}
    excluded = list_of(routing, "excluded_models", "plugins.")
    ask.patch["plugins"] = [*ask.plugins, {**routing, "excluded_models": [*excluded, *models.uncapped]}]
    ask.provider = {**ask.provider, "require_parameters": True}
