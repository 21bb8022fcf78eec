"""Bound: what a request can cost at most, and the caps that make it so. An upper bound of what OpenRouter can
bill, and the caps that make it one.

It must never be too low, never raise anything but a GatewayError whatever the body holds, and never touch the
network.

- Prompt tokens: at most one for each byte of the JSON body. A tokenizer never yields more tokens than its text has
  UTF-8 bytes, and JSON never writes text in fewer bytes than its UTF-8: an escape takes 2 bytes for 1, or 6 (12) for at
  most 3 (4). So the size of the body bounds all text in it unread; names, quotes and braces come on top and pay for
  what a chat template adds, and a key given twice only makes it longer. Only numbers may be written at greater length on
  their way (1e20), and count as long as that. This holds for UTF-8 bodies after decompression, and the JSON parser takes
  no others. What the provider's side adds for tools and schemas is an
  allowance, and so is an image, instead of its data URL. Encrypted reasoning counts as text, as long as what it hides.
- At most the context length for each input, and exactly that when searches, files, audio or the results of tools add
  what we do not see (an hour of silence takes few bytes, and many tokens).
- Prices: the dearest of all models that the body can reach, component by component, cache writes of an hour included.
  `provider.max_price` keeps dearer providers out; what it cannot keep out (priority tiers, native search, presets,
  routers) is refused. The router that picks one model is held at the client's own caps, times the most by which the
  bill of any listed model exceeds what a cap is compared with, and kept off models beyond that.
- Output: the limit that goes out, in the endpoint's own field (`max_output_tokens` of /responses, `max_tokens` of
  /messages), in every choice. Reasoning is part of it; a thinking budget that is not is refused. An image may come out
  whole though the limit ends in its midst: one for each choice comes on top.
- A tool that the upstream runs calls the model again, each time with up to the whole context, its fee and the whole
  output limit. The loop ends after the steps that we send, or the client's `max_cost`, and then once more (`turns`).
- What is not in the body (stored conversations and prompts, items by reference) or runs on after it (background,
  compaction) is refused, and so is every kind of item, block, part and tool that is not known here.
- /rerank: search units from the number of documents and the size of the body, each at the fee for a request; where
  tokens have a price, the query once more for every piece of a document.
- /images: `n` times the prompt, the fees and the model's longest output, but no less than an image of that size.
- /audio/speech: a byte is at least a token or a character. /audio/transcriptions: the context length, or a day's
  seconds, since the list does not say which of them a price is for, at the dearer of prompt and audio. Where the file
  says how long it lasts (`recordings`): those seconds in begun minutes, or 100 tokens for each of them, if that is more.
  These take no output limit, and by their documentation no price caps either: their prices are those of the list. One
  that the list does not name is never taken for zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import reduce
from typing import Any

from common.errors import BadRequest, ModelNotFound, UnboundedCost
from common.money import EXACT, plain
from gateway.pricing.candidates import Candidate, price_candidate
from gateway.pricing.catalog import MAX_TOKENS, Model, ModelIndex
from gateway.pricing.cost_drivers import CHAT_LIMITS, CostDrivers, list_of, wrong
from gateway.pricing.prices import ZERO, Rates, caps_of, dearest, max_price
from gateway.pricing.readers.body import UNBOUNDED_FIELDS, read_body

MAX_MODELS = 16
MAX_MODEL_LENGTH = 256
MIN_OUTPUT_TOKENS = 16  # some providers take no smaller limit
MEDIUM_ESTIMATE = 1_000  # a usual medium, for rate limits


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
    """An upper bound, for admission to turn into a hold: ceil((fixed_nanos + output_nanos x granted) x
    markup).

    Amounts are nano-dollars without markup. Output limits are tokens of one choice, and `output_nanos` is the
    price of one such token in every choice. Where the client has set a limit, `min_output == max_output`.
    """

    models: tuple[str, ...]  # every model id that the body can reach, as asked
    fixed_nanos: Decimal
    output_nanos: Decimal
    min_output: int
    max_output: int
    prompt_estimate: int  # tokens, for rate limits; not a bound
    patch: Mapping[str, Any]  # body fields to replace, whatever is granted
    max_price: Mapping[
        str, str
    ]  # the price caps that go out, in OpenRouter's units; {} where the endpoint takes none
    # a price cap of the client's own is the one that goes out: a refusal for it is the client's doing
    client_caps_price: bool
    listed: Rates  # the dearest of all models, for quotes
    requests: int  # how often the fee for a request falls due
    choices: int  # in which output may come; 0: there is none
    limits: tuple[
        tuple[str, int | None], ...
    ] = ()  # output limit fields to send, with the client's own number

    @property
    def price_basis(self) -> dict[str, Any]:
        """What the hold was computed from, for a receipt: decimals as plain text."""
        fixed, output = plain(self.fixed_nanos), plain(self.output_nanos)
        return {"fixed_nanos": fixed, "output_nanos": output, "max_price": dict(self.max_price)}

    @property
    def client_limit_field(self) -> str | None:
        """The field of the client's own output limit, which is all that may be granted; None where less will
        do.
        """
        own = next((name for name, limit in self.limits if limit is not None), "max_tokens")
        return own if self.min_output == self.max_output else None

    def apply(self, granted_output: int) -> dict[str, Any]:
        """The top-level fields to set in the body, so that the upstream keeps to what was granted."""
        caps = {
            name: granted_output if own is None else min(own, granted_output) for name, own in self.limits
        }
        return {**self.patch, **caps}

    def typical_nanos(self, output_tokens: int) -> Decimal:
        """Roughly what it costs with so much output, for a quote: listed prices, no cache, no media, no
        searches, one turn.
        """
        prompt = EXACT.multiply(self.listed.prompt, Decimal(self.prompt_estimate))
        output = EXACT.multiply(self.listed.completion, Decimal(self.choices * output_tokens))
        return EXACT.add(
            EXACT.add(prompt, output), EXACT.multiply(self.listed.request, Decimal(self.requests))
        )


def bound_request(
    endpoint: str,
    body: Mapping[str, Any],
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
    BadRequest (a field that we bill or route on is wrong), UnboundedCost, ModelNotFound, or Forbidden (a
    model without a price while free models are off). Each names its `param`.
    """
    names = _model_names(body)
    suffixes_asked = {suffix for name in names if ":" in name for suffix in name.split(":")[1:]}
    ask = read_body(endpoint, body, raw_size, suffixes_asked, seconds)
    suffixes, free = policy.any_suffix, policy.free_models
    reached = [
        price_candidate(endpoint, name, ask, models, more_suffixes=suffixes, free_models=free)
        for name in names
    ]
    if ask.routing is not None and not any(each.model.is_router for each in reached):
        raise UnboundedCost(
            "The plugin `auto-router` is bounded together with the model `openrouter/auto` only.",
            param="plugins",
        )
    rates = reduce(dearest, (each.rates for each in reached)) if len(reached) > 1 else reached[0].rates
    low, high, limits = _output_limits(reached, ask, policy)
    caps = max_price(_caps(rates, ask), ask.own_max_price) if ask.takes_provider else {}
    turn, output = _turn_nanos(reached, rates, ask), EXACT.multiply(rates.output, Decimal(ask.choices))
    turns, once = _turns(ask, turn, output, high)
    once = EXACT.add(
        once, max(each.search_nanos for each in reached) if len(reached) > 1 else reached[0].search_nanos
    )
    if any(each.makes_images for each in reached):  # one for each choice, beyond its limit
        once = EXACT.add(once, EXACT.multiply(output, Decimal(turns * ask.image_tokens)))
    return Bound(
        models=names,
        fixed_nanos=EXACT.add(turn if turns == 1 else EXACT.multiply(turn, Decimal(turns)), once),
        output_nanos=output if turns == 1 else EXACT.multiply(output, Decimal(turns)),
        min_output=low,
        max_output=high,
        prompt_estimate=_estimate(ask),
        patch={**ask.patch, "provider": {**ask.provider, "max_price": caps}}
        if ask.takes_provider
        else ask.patch,
        max_price=caps,
        client_caps_price=bool(ask.own_max_price) and _excludes(reached, ask),
        listed=rates,
        requests=ask.requests,
        choices=ask.choices if ask.has_output else 0,
        limits=limits,
    )


# The models that a body can reach, and what each can charge.


def _model_names(body: Mapping[str, Any]) -> tuple[str, ...]:
    names = [] if body.get("model") is None else [_model_name(body["model"], "model")]
    for param in ("models", "fallbacks"):
        if param not in body:
            continue
        entries = list_of(body, param)
        if len(entries) > MAX_MODELS:
            raise wrong(param, f"a list of at most {MAX_MODELS} model ids")
        names += (
            _model_name(entry.get("model") if isinstance(entry, dict) else entry, param) for entry in entries
        )
    if not names:
        raise BadRequest("`model` is missing. GET /v1/models lists those that exist.", param="model")
    return tuple(dict.fromkeys(names)) if len(names) > 1 else (names[0],)


def _model_name(value: object, param: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_MODEL_LENGTH:
        raise BadRequest(f"A model id is a string of 1 to {MAX_MODEL_LENGTH} characters.", param=param)
    if not value.isprintable():  # which the database would not take, behind a colon
        raise ModelNotFound(
            "No model has a name like this. GET /v1/models lists those that exist.", param=param
        )
    if "@preset" in value:
        raise UnboundedCost(UNBOUNDED_FIELDS["preset"], param=param)
    return value


# What it adds up to.


def _turn_nanos(reached: list[Candidate], rates: Rates, ask: CostDrivers) -> Decimal:
    """Everything but the output, the searches and what images come on top: prompt, fees for requests and
    images.
    """
    prompt = EXACT.multiply(rates.input, Decimal(max(each.prompt_tokens for each in reached)))
    fees = EXACT.multiply(rates.request, Decimal(ask.requests))
    if ask.images or ask.made_images:
        images = ask.images * max(1, ask.made_images) + ask.made_images
        fees = EXACT.add(fees, EXACT.multiply(rates.image, Decimal(images)))
    return EXACT.add(prompt, fees)


def _turns(ask: CostDrivers, turn: Decimal, output: Decimal, high: int) -> tuple[int, Decimal]:
    """How often the model may be called at full length, and the nano-dollars that may be spent before.

    A loop that is stopped by its cost goes beyond it by the turn that exceeds it, and the last one.
    """
    if not ask.tool_steps or ask.tool_cost is None or ask.native_turns:
        return ask.turns, ZERO
    whole = EXACT.multiply(EXACT.add(turn, EXACT.multiply(output, Decimal(high))), Decimal(ask.tool_steps))
    return (2, ask.tool_cost) if ask.tool_cost < whole else (ask.turns, ZERO)


def _caps(rates: Rates, ask: CostDrivers) -> dict[str, Decimal]:
    return caps_of(rates, images=ask.images > 0, audio=ask.has_audio)


def _excludes(reached: list[Candidate], ask: CostDrivers) -> bool:
    """Whether a cap of the client's own is what goes out for some model: it lies no higher than what is held,
    or nothing is. A router has none but those.
    """
    return any(
        each.model.is_router or _is_capped(_caps(each.rates, ask), ask.own_max_price) for each in reached
    )


def _is_capped(held: Mapping[str, Decimal], own: Mapping[str, Decimal]) -> bool:
    return any(name not in held or cap <= held[name] for name, cap in own.items())


def _estimate(ask: CostDrivers) -> int:
    media = ask.images + ask.has_files + ask.has_audio + (ask.search_results > 0)
    return max(1, (ask.raw_size - ask.media_bytes) // 4 + media * MEDIUM_ESTIMATE)


# How much may come out.


def _output_limits(
    reached: list[Candidate], ask: CostDrivers, policy: BoundPolicy
) -> tuple[int, int, tuple[tuple[str, int | None], ...]]:
    """The smallest and largest output to grant, and the limit fields to send.

    Models that list no limit among their parameters may write as much as they can, whatever is sent.
    """
    if not ask.has_output:
        return 0, 0, ()
    capped = [each.model for each in reached if each.model.limit_fields and ask.limit_names]
    free_running = [
        _require_max_output(each) for each in reached if not (each.model.limit_fields and ask.limit_names)
    ]
    high = max((_wanted_output(capped, ask, policy), *free_running)) if capped else max(free_running)
    open_ended = not ask.limits and not free_running
    return min(MIN_OUTPUT_TOKENS, high) if open_ended else high, high, _limit_fields(capped, ask)


def _require_max_output(each: Candidate) -> int:
    if each.max_output is None:
        raise UnboundedCost(
            f"{each.model.id!r} takes no output limit and has no known maximum.", param="model"
        )
    return each.max_output


def _wanted_output(capped: list[Model], ask: CostDrivers, policy: BoundPolicy) -> int:
    """The client's limit as far as one of the models can reach it, else what all of them can and the default
    allows.
    """
    maxima = [model.max_output or MAX_TOKENS for model in capped]
    return (
        min(max(ask.limits.values()), max(maxima))
        if ask.limits
        else min(policy.default_max_output_tokens, *maxima)
    )


def _limit_fields(capped: list[Model], ask: CostDrivers) -> tuple[tuple[str, int | None], ...]:
    """The client's limit fields, and as many more as it takes for every model to get one that it lists."""
    fields: dict[str, int | None] = {**ask.limits}
    if ask.limit_names is not CHAT_LIMITS:  # the endpoint has one of its own, and the upstream translates it
        return tuple((fields or dict.fromkeys(ask.limit_names if capped else ())).items())
    for model in sorted(capped, key=lambda model: len(model.limit_fields)):
        if model.limit_fields.isdisjoint(fields):
            fields[max(model.limit_fields)] = max(
                ask.limits.values(), default=None
            )  # "max_tokens" if it lists both
    return tuple(fields.items())
