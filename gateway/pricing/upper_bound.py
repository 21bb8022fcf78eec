"""The most that OpenRouter can bill for a request, and the caps that are sent along to make that so.

A bound must never be too low, never raise anything but a GatewayError whatever the body holds, and never
touch the network.

- Prompt tokens: at most one for each byte of the JSON body. A tokenizer never yields more tokens than its
  text has UTF-8 bytes, and JSON never writes text in fewer bytes than its UTF-8: an escape takes 2 bytes for
  1, or 6 (12) for at most 3 (4). So the size of the body bounds all text in it unread. Names, quotes and
  braces come on top and pay for what a chat template adds, and a key given twice only makes the body longer.
  Only numbers may be written at greater length on their way (1e20), and count as long as that. This holds for
  UTF-8 after decompression, and the JSON parser takes nothing else. What the provider's side adds for tools
  and schemas is an allowance, and so is an image, in place of its data URL. Encrypted reasoning counts as
  text, as long as what it hides.
- At most the context length for each input, and exactly that when searches, files, audio or the results of
  tools add what the gateway does not see (an hour of silence takes few bytes, and many tokens).
- Prices: the dearest of all models that the body can reach, component by component, cache writes of an hour
  included. `provider.max_price` keeps dearer providers out; what it cannot keep out (priority tiers, native
  search, presets, routers) is refused. The router that picks one model is held at the client's own caps,
  times the most by which the bill of any listed model exceeds what a cap is compared with, and is kept off
  models beyond that.
- Output: the limit that goes out, in the endpoint's own field (`max_output_tokens` of /responses,
  `max_tokens` of /messages), in every choice. Reasoning is part of it; a thinking budget that is not part of
  it is refused. An image may come out whole though the limit ends in its midst: one for each choice comes on
  top.
- A tool that the upstream runs calls the model again, each time with up to the whole context, its fee and the
  whole output limit. The loop ends after the steps that the gateway sends, or at the client's `max_cost`, and
  then calls the model once more (`turns`).
- What is not in the body (stored conversations and prompts, items by reference) or runs on after it
  (background, compaction) is refused, and so is every kind of item, block, part and tool that is not known
  here.
- /rerank: search units from the number of documents and the size of the body, each at the fee for a request;
  where tokens have a price, the query once more for every piece of a document.
- /images: `n` times the prompt, the fees and the model's longest output, but no less than an image of that
  size.
- /audio/speech: a byte is at least a token or a character. /audio/transcriptions: the context length or a
  day's seconds (the list does not say which of them a price is for), at the dearer of prompt and audio. Where
  the file says how long it lasts (`gateway/proxy/audio_duration.py`): those seconds in begun minutes, or 100
  tokens for each second, whichever is more. These endpoints take no output limit, and by their documentation
  no price caps either: their prices are those of the list. A price that the list does not name is never taken
  for zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import reduce
from typing import TypeAlias

from common.errors import BadRequest, ModelNotFound, UnboundedCost
from common.json_types import Json, JsonObject
from common.money import EXACT, plain
from db_rows.requests import PriceBasis
from gateway.pricing.candidates import Candidate, price_candidate
from gateway.pricing.catalog import MAX_TOKENS, Model, ModelIndex
from gateway.pricing.cost_drivers import CHAT_LIMITS, CostDrivers, list_of, wrong
from gateway.pricing.prices import ZERO, Rates, caps_of, dearest, max_price
from gateway.pricing.readers.body import UNBOUNDED_FIELDS, read_body

MAX_MODELS = 16
MAX_MODEL_LENGTH = 256
MIN_OUTPUT_TOKENS = 16  # some providers take no smaller limit
MEDIUM_ESTIMATE = 1_000  # tokens of a usual image, file or recording, for rate limits

# The output limit fields of a body, each with the client's own number where it has set one.
LimitFields: TypeAlias = tuple[tuple[str, int | None], ...]


@dataclass(frozen=True, slots=True)
class BoundPolicy:
    """The operator's part. `any_suffix`: the sandbox's scenarios, which may follow any model's id after a
    colon.
    """

    default_max_output_tokens: int
    free_models: bool
    any_suffix: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound, for admission to turn into a hold: ceil((fixed_nanos + output_nanos x granted output) x
    markup).

    Amounts are nano-dollars without markup. Output limits are tokens of one choice, and `output_nanos` is the
    price of one such token in every choice. Where the client has set a limit, `min_output == max_output`.
    """

    models: tuple[str, ...]  # every model id that the body can reach, as the client wrote it
    fixed_nanos: Decimal
    output_nanos: Decimal
    min_output: int
    max_output: int
    prompt_estimate: int  # tokens, for rate limits; not a bound
    patch: JsonObject  # body fields to replace, whatever is granted
    max_price: Mapping[
        str, str
    ]  # the price caps that go out, in OpenRouter's units; {}: the endpoint takes none
    # The client's own price cap is the one that goes out, so that a refusal for the price is the client's
    # doing.
    client_caps_price: bool
    rates: Rates  # the dearest of all models
    requests: int  # how often the fee for a request falls due
    choices: int  # in which output may come; 0: there is none
    limits: LimitFields = ()  # the output limit fields to send

    @property
    def price_basis(self) -> PriceBasis:
        """What the hold was computed from, for a receipt: decimals as plain text."""
        fixed, output = plain(self.fixed_nanos), plain(self.output_nanos)
        return {"fixed_nanos": fixed, "output_nanos": output, "max_price": {**self.max_price}}

    @property
    def client_limit_field(self) -> str | None:
        """The field of the client's own output limit; None where less than `max_output` may be granted."""
        if self.min_output < self.max_output:
            return None
        return next((name for name, limit in self.limits if limit is not None), "max_tokens")

    def apply(self, granted_output: int) -> dict[str, Json]:
        """The top-level fields to set in the body, so that the upstream keeps to what was granted."""
        caps = {name: min(limit or granted_output, granted_output) for name, limit in self.limits}
        return {**self.patch, **caps}

    def typical_nanos(self, output_tokens: int) -> Decimal:
        """A rough cost for a quote: so much output, listed prices, one turn, no cache, media or searches."""
        prompt = EXACT.multiply(self.rates.prompt, Decimal(self.prompt_estimate))
        output = EXACT.multiply(self.rates.completion, Decimal(self.choices * output_tokens))
        fees = EXACT.multiply(self.rates.request, Decimal(self.requests))
        return EXACT.add(EXACT.add(prompt, output), fees)


def bound_request(
    endpoint: str,
    body: JsonObject,
    raw_size: int,
    models: ModelIndex,
    policy: BoundPolicy,
    *,
    seconds: int | None = None,
) -> Bound:
    """The bound of a parsed body of `raw_size` bytes.

    Endpoints: "chat/completions", "completions", "embeddings", "responses", "messages", "rerank", "images",
    "audio/speech" and "audio/transcriptions". For a form, the body is its text fields and `raw_size` the
    whole form's; `seconds` is the most that a recording to be transcribed lasts, where that is known. Raises
    BadRequest (a field that the gateway bills or routes on is wrong), UnboundedCost, ModelNotFound, or
    Forbidden (a model without a price while free models are off). Each names its `param`.
    """
    names = _model_names(body)
    suffixes = {suffix for name in names for suffix in name.split(":")[1:]}
    drivers = read_body(endpoint, body, raw_size, suffixes, seconds)
    more, free = policy.any_suffix, policy.free_models
    candidates = [
        price_candidate(endpoint, name, drivers, models, more_suffixes=more, free_models=free)
        for name in names
    ]
    _refuse_stray_routing(candidates, drivers)
    return _bound(names, candidates, drivers, policy)


def _refuse_stray_routing(candidates: list[Candidate], drivers: CostDrivers) -> None:
    if drivers.routing is not None and not any(candidate.model.is_router for candidate in candidates):
        message = "The plugin `auto-router` is bounded together with the model `openrouter/auto` only."
        raise UnboundedCost(message, param="plugins")


def _bound(
    names: tuple[str, ...], candidates: list[Candidate], drivers: CostDrivers, policy: BoundPolicy
) -> Bound:
    rates = reduce(dearest, [candidate.rates for candidate in candidates])
    low, high, limits = _output_limits(candidates, drivers, policy)
    fixed_nanos, output_nanos = _sum_up(candidates, rates, drivers, high)
    caps, patch = _price_caps(rates, drivers)
    return Bound(
        models=names,
        fixed_nanos=fixed_nanos,
        output_nanos=output_nanos,
        min_output=low,
        max_output=high,
        prompt_estimate=_estimate_prompt(drivers),
        patch=patch,
        max_price=caps,
        client_caps_price=_client_caps_price(candidates, drivers),
        rates=rates,
        requests=drivers.requests,
        choices=drivers.choices if drivers.has_output else 0,
        limits=limits,
    )


# The models that a body can reach.


def _model_names(body: JsonObject) -> tuple[str, ...]:
    names = [] if body.get("model") is None else [_model_name(body["model"], "model")]
    for param in ("models", "fallbacks"):
        if param in body:
            names += _listed_names(body, param)
    if not names:
        raise BadRequest("`model` is missing. GET /v1/models lists those that exist.", param="model")
    return tuple(dict.fromkeys(names)) if len(names) > 1 else (names[0],)


def _listed_names(body: JsonObject, param: str) -> list[str]:
    """The models of a list of ids, or of objects with a `model`."""
    entries = list_of(body, param)
    if len(entries) > MAX_MODELS:
        raise wrong(param, f"a list of at most {MAX_MODELS} model ids")
    return [_model_name(entry.get("model") if isinstance(entry, dict) else entry, param) for entry in entries]


def _model_name(value: Json, param: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_MODEL_LENGTH:
        raise BadRequest(f"A model id is a string of 1 to {MAX_MODEL_LENGTH} characters.", param=param)
    if not value.isprintable():  # the database would not take it, behind a colon
        message = "No model has a name like this. GET /v1/models lists those that exist."
        raise ModelNotFound(message, param=param)
    if "@preset" in value:
        raise UnboundedCost(UNBOUNDED_FIELDS["preset"], param=param)
    return value


# What it adds up to.


def _sum_up(
    candidates: list[Candidate], rates: Rates, drivers: CostDrivers, max_output: int
) -> tuple[Decimal, Decimal]:
    """Nano-dollars of everything but the output, and of one output token in every choice and turn."""
    turn = _turn_nanos(candidates, rates, drivers)
    output = EXACT.multiply(rates.output, Decimal(drivers.choices))
    turns, spent_before = _turns(drivers, turn, output, max_output)
    once = EXACT.add(spent_before, max(candidate.search_nanos for candidate in candidates))
    if any(candidate.makes_images for candidate in candidates):  # one for each choice, beyond its limit
        once = EXACT.add(once, EXACT.multiply(output, Decimal(turns * drivers.image_tokens)))
    fixed = EXACT.add(EXACT.multiply(turn, Decimal(turns)), once)
    return fixed, EXACT.multiply(output, Decimal(turns))


def _turn_nanos(candidates: list[Candidate], rates: Rates, drivers: CostDrivers) -> Decimal:
    """Nano-dollars of one call of the model without its output and its searches: the prompt, and the fees for
    requests and images.
    """
    tokens = max(candidate.prompt_tokens for candidate in candidates)
    prompt = EXACT.multiply(rates.input, Decimal(tokens))
    fees = EXACT.multiply(rates.request, Decimal(drivers.requests))
    if drivers.images or drivers.made_images:
        images = drivers.images * max(1, drivers.made_images) + drivers.made_images
        fees = EXACT.add(fees, EXACT.multiply(rates.image, Decimal(images)))
    return EXACT.add(prompt, fees)


def _turns(drivers: CostDrivers, turn: Decimal, output: Decimal, max_output: int) -> tuple[int, Decimal]:
    """How often the model may be called at full length, and the nano-dollars that may be spent before.

    A loop that is stopped by its cost goes beyond it by the turn that exceeds it, and by the last one.
    """
    if not drivers.tool_steps or drivers.tool_cost is None or drivers.native_turns:
        return drivers.turns, ZERO
    full_turn = EXACT.add(turn, EXACT.multiply(output, Decimal(max_output)))
    all_steps = EXACT.multiply(full_turn, Decimal(drivers.tool_steps))
    return (2, drivers.tool_cost) if drivers.tool_cost < all_steps else (drivers.turns, ZERO)


def _estimate_prompt(drivers: CostDrivers) -> int:
    media = drivers.images + drivers.has_files + drivers.has_audio + (drivers.search_results > 0)
    # Four bytes a token is usual for English. Too low or too high, this only moves a rate limit.
    return max(1, (drivers.raw_size - drivers.media_bytes) // 4 + media * MEDIUM_ESTIMATE)


# The price caps that go out.


def _price_caps(rates: Rates, drivers: CostDrivers) -> tuple[dict[str, str], JsonObject]:
    """The caps that go out, and the body fields to replace; an endpoint without `provider` gets no caps."""
    if not drivers.takes_provider:
        return {}, drivers.patch
    caps = max_price(_held_caps(rates, drivers), drivers.client_caps)
    return caps, {**drivers.patch, "provider": {**drivers.provider, "max_price": {**caps}}}


def _held_caps(rates: Rates, drivers: CostDrivers) -> dict[str, Decimal]:
    return caps_of(rates, images=drivers.images > 0, audio=drivers.has_audio)


def _client_caps_price(candidates: list[Candidate], drivers: CostDrivers) -> bool:
    """Whether a cap of the client's own is what goes out for some model. A router has no other caps."""
    return bool(drivers.client_caps) and any(
        candidate.model.is_router or _is_capped(_held_caps(candidate.rates, drivers), drivers.client_caps)
        for candidate in candidates
    )


def _is_capped(held: Mapping[str, Decimal], client_caps: Mapping[str, Decimal]) -> bool:
    """Whether a cap of the client's is no higher than what is held, or nothing is held for what it caps."""
    return any(name not in held or cap <= held[name] for name, cap in client_caps.items())


# How much may come out.


def _output_limits(
    candidates: list[Candidate], drivers: CostDrivers, policy: BoundPolicy
) -> tuple[int, int, LimitFields]:
    """The smallest and largest output to grant, and the limit fields to send."""
    if not drivers.has_output:
        return 0, 0, ()
    limited = [candidate.model for candidate in candidates if _takes_limit(candidate, drivers)]
    # Models that list no limit among their parameters may write as much as they can, whatever is sent.
    unlimited = [
        _require_max_output(candidate) for candidate in candidates if not _takes_limit(candidate, drivers)
    ]
    high = max([_wanted_output(limited, drivers, policy), *unlimited] if limited else unlimited)
    is_open = not drivers.limits and not unlimited
    return min(MIN_OUTPUT_TOKENS, high) if is_open else high, high, _limit_fields(limited, drivers)


def _takes_limit(candidate: Candidate, drivers: CostDrivers) -> bool:
    return bool(candidate.model.limit_fields and drivers.limit_names)


def _require_max_output(candidate: Candidate) -> int:
    if candidate.max_output is None:
        message = f"{candidate.model.id!r} takes no output limit and has no known maximum."
        raise UnboundedCost(message, param="model")
    return candidate.max_output


def _wanted_output(models: Sequence[Model], drivers: CostDrivers, policy: BoundPolicy) -> int:
    """The client's limit as far as a model can reach it, else what all of them can and the default allows."""
    maxima = [model.max_output or MAX_TOKENS for model in models]
    if drivers.limits:
        return min(max(drivers.limits.values()), max(maxima))
    return min(policy.default_max_output_tokens, *maxima)


def _limit_fields(models: Sequence[Model], drivers: CostDrivers) -> LimitFields:
    """The client's limit fields, and as many more as it takes for every model to get one that it lists."""
    fields: dict[str, int | None] = {**drivers.limits}
    # An endpoint with one field of its own: the upstream translates it for the model.
    if drivers.limit_names is not CHAT_LIMITS:
        return tuple((fields or dict.fromkeys(drivers.limit_names if models else ())).items())
    limit = max(drivers.limits.values(), default=None)
    for model in sorted(models, key=lambda model: len(model.limit_fields)):
        if model.limit_fields.isdisjoint(fields):
            fields[max(model.limit_fields)] = limit  # "max_tokens" if it lists both
    return tuple(fields.items())
