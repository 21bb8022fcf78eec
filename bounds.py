"""What can this request cost at most? An upper bound of what OpenRouter can bill, and the caps that make it one.

It must never be too low, never raise anything but a GatewayError whatever the body holds, and never touch the network.

- Prompt tokens: at most one for each byte of the JSON body. A tokenizer never yields more tokens than its text has
  UTF-8 bytes, and JSON never writes text in fewer bytes than its UTF-8: an escape takes 2 bytes for 1, or 6 (12) for at
  most 3 (4). So the size of the body bounds all text in it unread; names, quotes and braces come on top and pay for
  what a chat template adds, and a key given twice only makes it longer. This holds for UTF-8 bodies after
  decompression, and the JSON parser takes no others. What the provider's side adds for tools and schemas is an
  allowance, and so is an image, instead of its data URL.
- At most the context length for each input, and exactly that when searches, files or audio add what we do not see (an
  hour of silence takes few bytes, and many tokens).
- Prices: the dearest of all models that the body can reach, component by component. `provider.max_price` keeps dearer
  providers out; what it cannot keep out (priority tiers, native search, presets, routers) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import reduce
from typing import Any

from bodies import UNBOUNDED_FIELDS, Ask, list_of, read_body, wrong
from catalog import MAX_TOKENS, Model, ModelIndex
from errors import BadRequest, Forbidden, ModelNotFound, UnboundedCost
from money import EXACT
from prices import ZERO, Price, Rates, dearest, max_price, search_nanos

MAX_MODELS = 16
MAX_MODEL_LENGTH = 256
SELF_SEARCHES = 5  # what a model that searches by itself is held for: nothing documents its maximum
MIN_OUTPUT_TOKENS = 16  # some providers take no smaller limit

# The most that is documented for one image: gpt-4o-mini, 2,833 + 8 tiles of 5,667.
IMAGE_TOKENS = 48_169
MEDIUM_ESTIMATE = 1_000  # a usual medium, for rate limits


@dataclass(frozen=True, slots=True)
class BoundPolicy:
    """The operator's part. `any_suffix`: the sandbox's scenarios, which may follow any model's id after a colon."""

    default_max_output_tokens: int
    free_models: bool
    any_suffix: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound, for admission to turn into a hold: ceil((fixed_nanos + output_nanos x granted) x markup).

    Amounts are nano-dollars without markup. Output limits are tokens of one choice, and `output_nanos` is the price of
    one such token in every choice. Where the client has set a limit, `min_output == max_output`.
    """

    models: tuple[str, ...]  # every model id that the body can reach, as asked
    fixed_nanos: Decimal
    output_nanos: Decimal
    min_output: int
    max_output: int
    prompt_estimate: int  # tokens, for rate limits; not a bound
    patch: Mapping[str, Any]  # body fields to replace, whatever is granted
    limits: tuple[tuple[str, int | None], ...] = ()  # output limit fields to send, with the client's own number

    def apply(self, granted_output: int) -> dict[str, Any]:
        """The top-level fields to set in the body, so that the upstream keeps to what was granted."""
        caps = {name: granted_output if own is None else min(own, granted_output) for name, own in self.limits}
        return {**self.patch, **caps}


@dataclass(frozen=True, slots=True)
class _Reached:
    """A model that the body can reach, and the dearest that it can charge for this body."""

    model: Model
    rates: Rates
    prompt_tokens: int
    search_nanos: Decimal


def bound_request(endpoint: str, body: Mapping[str, Any], raw_size: int, models: ModelIndex, policy: BoundPolicy) -> Bound:
    """The bound of a parsed body of `raw_size` bytes, for "chat/completions", "completions" or "embeddings".

    Raises BadRequest (a field that we bill or route on is wrong), UnboundedCost, ModelNotFound, or Forbidden (a model
    without a price while free models are off). Each names its `param`.
    """
    names = _model_names(body)
    ask = read_body(endpoint, body, {suffix for name in names for suffix in name.split(":")[1:]})
    reached = [_reach(name, ask, raw_size, models, policy) for name in names]
    rates = reduce(dearest, (each.rates for each in reached))
    low, high, limits = _output_limits([each.model for each in reached], ask, policy)
    caps = max_price(rates, ask.own_max_price, images=ask.images > 0)
    return Bound(
        models=names,
        fixed_nanos=_fixed_nanos(reached, rates, ask),
        output_nanos=EXACT.multiply(rates.output, Decimal(ask.choices)),
        min_output=low,
        max_output=high,
        prompt_estimate=_estimate(ask, raw_size),
        patch={**ask.patch, "provider": {**ask.provider, "max_price": caps}},
        limits=limits,
    )


# The models that a body can reach, and what each can charge.


def _model_names(body: Mapping[str, Any]) -> tuple[str, ...]:
    names = [] if body.get("model") is None else [_model_name(body["model"], "model")]
    for param in ("models", "fallbacks"):
        entries = list_of(body, param)
        if len(entries) > MAX_MODELS:
            raise wrong(param, f"a list of at most {MAX_MODELS} model ids")
        names += (_model_name(entry.get("model") if isinstance(entry, dict) else entry, param) for entry in entries)
    if not names:
        raise BadRequest("`model` is missing. GET /v1/models lists those that exist.", param="model")
    return tuple(dict.fromkeys(names))


def _model_name(value: object, param: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_MODEL_LENGTH:
        raise BadRequest(f"A model id is a string of 1 to {MAX_MODEL_LENGTH} characters.", param=param)
    if "@preset" in value:
        raise UnboundedCost(UNBOUNDED_FIELDS["preset"], param=param)
    return value


def _reach(name: str, ask: Ask, raw_size: int, models: ModelIndex, policy: BoundPolicy) -> _Reached:
    model = models.resolve(name, more_suffixes=policy.any_suffix)
    if model is None:
        raise ModelNotFound(f"The model {name!r} does not exist. GET /v1/models lists those that do.", param="model")
    if model.price is None or model.id.endswith(":batch"):
        raise UnboundedCost(f"{name!r} has no fixed price here (routers and batch models have none).", param="model")
    prompt_tokens = _prompt_tokens(model, ask, raw_size)
    rates = _rates(model, model.price, prompt_tokens, ask)
    if not policy.free_models and _is_free(model, rates, ask):
        message = f"{name!r} costs nothing, and free models are switched off on this gateway. Use a priced one."
        raise Forbidden(message, param="model", code="free_models_disabled")
    return _Reached(model, rates, prompt_tokens, _search_nanos(model, rates, ask))


def _is_free(model: Model, rates: Rates, ask: Ask) -> bool:
    """Whether the model itself asks nothing for this body. The fee of a search plugin does not make it a priced one."""
    fees = (rates.request, rates.image if ask.images else ZERO, rates.web_search if model.searches else ZERO)
    return not any((rates.input, rates.output, *fees))


def _prompt_tokens(model: Model, ask: Ask, raw_size: int) -> int:
    """The most prompt tokens that this model can count."""
    context = model.context_length
    if ask.has_files or ask.has_audio or ask.search_results or model.searches:
        if context is None:
            message = f"{model.id!r} has no known context length to bound files, audio and searches."
            raise UnboundedCost(message, param="model")
        return context * ask.inputs
    tokens = max(0, raw_size - ask.media_bytes) + ask.images * IMAGE_TOKENS + ask.allowance
    return tokens if context is None else min(tokens, context * ask.inputs)


def _rates(model: Model, price: Price, prompt_tokens: int, ask: Ask) -> Rates:
    """The model's rates for this body: `input` and `output` are the dearest of text and of the media it uses."""
    found, outputs = price.rates_for(prompt_tokens), ask.outputs(model)
    media_in, media_out = ask.images or ask.has_files or ask.has_audio, outputs - {"text"}
    if price.unknown_features and (media_in or media_out or ask.search_results):
        raise UnboundedCost(f"{model.id!r} has prices for media or searches that are not known here.", param="model")
    if not media_in and not media_out and ask.has_output:
        return found
    dear_input = max(found.input, found.image_token) if media_in else found.input
    if ask.has_audio:
        dear_input = max(dear_input, _require(found.audio, model, "audio input", "messages"))
    dear_output = found.output if ask.has_output else ZERO
    for modality, rate in (("image", found.image_output), ("audio", found.audio_output)):
        if modality in outputs and (rate is not None or ask.modalities or model.output_modalities):
            dear_output = max(dear_output, _require(rate, model, f"{modality} output", "modalities"))
    return replace(found, input=dear_input, output=dear_output)


def _require(rate: Decimal | None, model: Model, what: str, param: str) -> Decimal:
    if rate is None:
        raise UnboundedCost(f"{model.id!r} names no price for {what}.", param=param)
    return rate


def _search_nanos(model: Model, rates: Rates, ask: Ask) -> Decimal:
    own = EXACT.multiply(rates.web_search, Decimal(SELF_SEARCHES)) if model.searches else ZERO
    return EXACT.add(own, search_nanos(rates, ask.search_results)) if ask.search_results else own


def _fixed_nanos(reached: list[_Reached], rates: Rates, ask: Ask) -> Decimal:
    """Everything but the output: prompt, request fee, images, searches."""
    prompt = EXACT.multiply(rates.input, Decimal(max(each.prompt_tokens for each in reached)))
    fees = EXACT.add(rates.request, max(each.search_nanos for each in reached))
    return EXACT.add(EXACT.add(prompt, fees), EXACT.multiply(rates.image, Decimal(ask.images)))


def _estimate(ask: Ask, raw_size: int) -> int:
    media = ask.images + ask.has_files + ask.has_audio + (ask.search_results > 0)
    return max(1, (raw_size - ask.media_bytes) // 4 + media * MEDIUM_ESTIMATE)


# How much may come out.


def _output_limits(models: list[Model], ask: Ask, policy: BoundPolicy) -> tuple[int, int, tuple[tuple[str, int | None], ...]]:
    """The smallest and largest output to grant, and the limit fields to send.

    Models that list no limit among their parameters may write as much as they can, whatever is sent.
    """
    if not ask.has_output:
        return 0, 0, ()
    capped = [model for model in models if model.limit_fields]
    free_running = [_require_max_output(model) for model in models if not model.limit_fields]
    high = max((_wanted_output(capped, ask, policy), *free_running)) if capped else max(free_running)
    open_ended = not ask.limits and not free_running
    return min(MIN_OUTPUT_TOKENS, high) if open_ended else high, high, _limit_fields(capped, ask)


def _require_max_output(model: Model) -> int:
    if model.max_output is None:
        raise UnboundedCost(f"{model.id!r} takes no output limit and has no known maximum.", param="model")
    return model.max_output


def _wanted_output(capped: list[Model], ask: Ask, policy: BoundPolicy) -> int:
    """The client's limit as far as one of the models can reach it, else what all of them can and the default allows."""
    maxima = [model.max_output or MAX_TOKENS for model in capped]
    return min(max(ask.limits.values()), max(maxima)) if ask.limits else min(policy.default_max_output_tokens, *maxima)


def _limit_fields(capped: list[Model], ask: Ask) -> tuple[tuple[str, int | None], ...]:
    """The client's limit fields, and as many more as it takes for every model to get one that it lists."""
    fields: dict[str, int | None] = {**ask.limits}
    for model in sorted(capped, key=lambda model: len(model.limit_fields)):
        if model.limit_fields.isdisjoint(fields):
            fields[max(model.limit_fields)] = max(ask.limits.values(), default=None)  # "max_tokens" if it lists both
    return tuple(fields.items())
