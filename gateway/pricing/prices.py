"""OpenRouter's `pricing` object as exact rates, at the dearest reading.

No float must ever pass through here, and no price that is not understood may ever be taken for free. Units
and conditions are those of https://openrouter.ai/docs/guides/overview/models: dollars per unit as decimal
strings. Where that leaves room, the dearest reading is taken:

- `discount` lowers nothing (listed prices may or may not contain it); a negative one raises every price.
- `overrides` by time of day or week count at any time, since a request may run across the boundary and clocks
  differ; so do those under conditions that are not known here. Those by prompt length count where the prompt
  may be that long. An override never makes anything cheaper here.
- Price components that OpenRouter adds later must neither be free nor take every model offline. One named
  like an input or output rate joins the dearest of that side. One named after a medium, file or search can
  only be met by bodies that use such a feature: these are refused (`unknown_features`), plain text is not.
  Any other one that is not zero leaves the model without a bound, until this module knows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Context, Decimal

from common.json_types import Json, JsonObject
from common.money import EXACT, parse_amount, plain

ZERO = Decimal(0)
_SMALLEST_DOLLARS = Decimal("1e-18")
_MAX_DOLLARS = Decimal(1_000_000)
_ROUND_UP = Context(prec=50, rounding=ROUND_CEILING)

# The dearest search engine with a documented price is Exa in its deep-reasoning mode: 15 dollars for a
# thousand searches with 10 results each, and one for a thousand more results. An older page of the same
# documentation (features/web-search) has four dollars for a thousand results: the dearer of both counts.
_SEARCH_NANOS = Decimal(15_000_000)
_INCLUDED_RESULTS = 10
_EXTRA_RESULT_NANOS = Decimal(1_000_000)
_OLD_RESULT_NANOS = Decimal(4_000_000)

_INPUT = ("prompt", "input_cache_read", "input_cache_write", "input_cache_write_1h")
_OUTPUT = ("completion", "internal_reasoning")
_FEATURES = (
    "image",
    "image_token",
    "image_output",
    "audio",
    "audio_output",
    "input_audio_cache",
    "web_search",
)
_KNOWN = frozenset((*_INPUT, *_OUTPUT, *_FEATURES, "request"))
_NOT_A_PRICE = frozenset(("discount", "overrides"))
_CONDITIONS = frozenset(("min_prompt_tokens", "utc_start", "utc_end", "utc_days"))

_UNKNOWN = "unknown"  # a price of media, files or searches that nobody here can read
# What a component counts as that OpenRouter adds later, by the words in its name. Features come first: a
# price of image input is none of text.
_STAND_INS = (
    (("image", "audio", "video", "file", "pdf", "page", "search", "fetch"), _UNKNOWN),
    (("input", "prompt", "cache"), "input_cache_write"),
    (("output", "completion", "reasoning"), "internal_reasoning"),
)
# From nano-dollars per unit to the dollars of `provider.max_price`, as powers of ten: tokens are counted by
# the million there, everything else one by one.
_CAP_SCALES = {"prompt": -3, "completion": -3}
_NUMBER_LIKE = re.compile(r"\d|nan|inf", re.IGNORECASE)


class _Unpriced(Exception):
    """This pricing object does not say what a request costs at most."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Nano-dollars per unit, each the dearest that can apply. None: the model names no such price."""

    prompt: Decimal  # per prompt token as listed: what `provider.max_price` is compared with
    completion: Decimal  # per output token as listed, likewise
    input: Decimal  # per prompt token of text: the dearest of prompt, cache read and cache write
    output: Decimal  # per output token of text: the dearer of completion and reasoning
    request: Decimal
    image: Decimal  # per input image
    image_token: Decimal  # per prompt token of an image
    web_search: Decimal  # per search
    audio: Decimal | None  # per prompt token of audio
    # Per output token. It is documented per image, too, which is never more than per token.
    image_output: Decimal | None
    audio_output: Decimal | None  # per output token


@dataclass(frozen=True, slots=True)
class Price:
    """A model's rates: `base`, and dearer ones (`tiers`, ascending) for prompts longer than a threshold of
    tokens.
    """

    base: Rates
    tiers: tuple[tuple[int, Rates], ...] = ()
    unknown_features: bool = False  # media, files or searches have a price that we cannot read

    def rates_for(self, prompt_tokens: int) -> Rates:
        """The dearest rates for prompts up to this length. A tier applies above its threshold, not at it."""
        tiers = [rates for threshold, rates in self.tiers if prompt_tokens > threshold]
        return tiers[-1] if tiers else self.base

    @property
    def dearest(self) -> Rates:
        """The rates for the longest prompts."""
        return self.tiers[-1][1] if self.tiers else self.base


def parse_price(pricing: Json) -> Price | None:
    """The price of a model out of its `pricing` (JSON parsed with `parse_float=Decimal`), or None: it has no
    bound. That is so where `prompt` or `completion` is missing, or where any price is negative ("-1" marks
    routers), not a number or absurd (above a million dollars a unit).
    """
    if not isinstance(pricing, dict):
        return None
    try:
        return _parse(pricing)
    except _Unpriced:
        return None


def dearest(first: Rates, second: Rates) -> Rates:
    """The dearer of two, component by component; a price that only one of them names counts."""
    return Rates(
        prompt=max(first.prompt, second.prompt),
        completion=max(first.completion, second.completion),
        input=max(first.input, second.input),
        output=max(first.output, second.output),
        request=max(first.request, second.request),
        image=max(first.image, second.image),
        image_token=max(first.image_token, second.image_token),
        web_search=max(first.web_search, second.web_search),
        audio=_dearer(first.audio, second.audio),
        image_output=_dearer(first.image_output, second.image_output),
        audio_output=_dearer(first.audio_output, second.audio_output),
    )


def search_nanos(rates: Rates, results: int) -> Decimal:
    """Nano-dollars of one search by the web plugin that may return so many results.

    Source: https://openrouter.ai/docs/guides/features/plugins/web-search
    """
    extra = EXACT.multiply(_EXTRA_RESULT_NANOS, Decimal(max(0, results - _INCLUDED_RESULTS)))
    listed = EXACT.multiply(rates.web_search, Decimal(results))
    return max(EXACT.add(_SEARCH_NANOS, extra), EXACT.multiply(_OLD_RESULT_NANOS, Decimal(results)), listed)


def caps_of(rates: Rates, *, images: bool, audio: bool) -> dict[str, Decimal]:
    """These rates in the units of `provider.max_price`.

    Dollars per million prompt and completion tokens, and per request, image and audio unit (which is taken
    for the unit of the model list, a token). Source:
    https://openrouter.ai/docs/guides/routing/provider-selection#max-price
    """
    nanos = {"prompt": rates.prompt, "completion": rates.completion, "request": rates.request}
    if images:
        nanos["image"] = rates.image
    if audio and rates.audio is not None:
        nanos["audio"] = rates.audio
    return {name: price.scaleb(_CAP_SCALES.get(name, -9), EXACT) for name, price in nanos.items()}


def max_price(held: Mapping[str, Decimal], client_caps: Mapping[str, Decimal]) -> dict[str, str]:
    """`provider.max_price` to send: what is held, or the client's own caps where they are lower; decimal
    strings, never floats.
    """
    lower = {name: min(price, client_caps.get(name, price)) for name, price in held.items()}
    return {name: plain(price) for name, price in {**client_caps, **lower}.items()}


@dataclass(frozen=True, slots=True)
class Markups:
    """How far a bill can exceed the prices that `provider.max_price` is compared with, over all models of a
    list.

    Cache writes, tokens of images, long prompts and reasoning may cost more than the listed `prompt` and
    `completion`, by these factors. `free_*` are nano-dollars per token of models whose listed price is zero.
    """

    input: Decimal = Decimal(1)
    output: Decimal = Decimal(1)
    free_input: Decimal = ZERO
    free_output: Decimal = ZERO

    def rates(self, prompt: Decimal, completion: Decimal, request: Decimal, image: Decimal) -> Rates:
        """The dearest bill at these caps, in nano-dollars per unit."""
        dear_input = max(EXACT.multiply(prompt, self.input), self.free_input)
        return Rates(
            prompt=prompt,
            completion=completion,
            input=dear_input,
            output=max(EXACT.multiply(completion, self.output), self.free_output),
            request=request,
            image=image,
            image_token=dear_input,
            web_search=ZERO,
            audio=None,
            image_output=None,
            audio_output=None,
        )


def markups(prices: Iterable[Price]) -> Markups:
    """The markups over these prices."""
    most = Markups()
    for price in prices:
        listed, billed = price.base, price.dearest
        most = replace(
            most,
            **_markup("input", listed.prompt, billed.image_token, most.input, most.free_input),
            **_markup("output", listed.completion, billed.output, most.output, most.free_output),
        )
    return most


def _markup(
    name: str, listed: Decimal, billed: Decimal, factor: Decimal, free: Decimal
) -> dict[str, Decimal]:
    if listed:
        return {name: max(factor, _ROUND_UP.divide(billed, listed))}
    return {f"free_{name}": max(free, billed)}


def _parse(pricing: JsonObject) -> Price:
    surcharge = _surcharge(pricing.get("discount"))
    base = _components(pricing, surcharge)
    if "prompt" not in base or "completion" not in base:
        raise _Unpriced
    by_length: list[tuple[int, dict[str, Decimal]]] = []
    for override in _overrides(pricing):
        threshold, prices = _threshold(override), _components(override, surcharge)
        if threshold is None:  # it may apply to any request
            base = _merged(base, prices)
        else:
            by_length.append((threshold, prices))
    tiers = tuple((threshold, _rates(prices)) for threshold, prices in _tiers(base, by_length))
    unknown = any(_UNKNOWN in prices for prices in (base, *(prices for _, prices in by_length)))
    return Price(_rates(base), tiers, unknown)


def _surcharge(discount: Json) -> Decimal:
    """The factor by which a negative discount raises every price."""
    if discount is None:
        return Decimal(1)
    if isinstance(discount, bool) or not isinstance(discount, int | Decimal):
        raise _Unpriced
    if not Decimal(discount).is_finite():
        raise _Unpriced
    return EXACT.subtract(Decimal(1), min(Decimal(discount), ZERO))


def _overrides(pricing: JsonObject) -> list[JsonObject]:
    entries = pricing.get("overrides")
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise _Unpriced
    overrides: list[JsonObject] = [entry for entry in entries if isinstance(entry, dict)]
    if len(overrides) < len(entries):
        raise _Unpriced
    return overrides


def _threshold(override: JsonObject) -> int | None:
    """The prompt length in tokens above which an override applies; None if it may apply to any prompt."""
    tokens = override.get("min_prompt_tokens")
    return tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else None


def _components(pricing: JsonObject, surcharge: Decimal) -> dict[str, Decimal]:
    """The prices in a pricing object or override, in nano-dollars."""
    prices: dict[str, Decimal] = {}
    for name, value in pricing.items():
        if value is None or name in _NOT_A_PRICE or name in _CONDITIONS:
            continue
        if name in _KNOWN:
            prices = _merged(prices, {name: _nanos(value, surcharge)})
        elif not _is_harmless(value):
            prices = _merged(prices, {_stand_in(name): _nanos(value, surcharge)})
    return prices


def _is_harmless(value: Json) -> bool:
    """Whether an unknown entry of `pricing` costs nothing: a zero, a flag, or a label such as a currency."""
    if isinstance(value, bool) or parse_amount(value) == 0:
        return True
    return isinstance(value, str) and not _NUMBER_LIKE.search(value)


def _stand_in(name: str) -> str:
    """The component that an unknown one counts as."""
    for words, component in _STAND_INS:
        if any(word in name.lower() for word in words):
            return component
    raise _Unpriced


def _nanos(value: Json, surcharge: Decimal) -> Decimal:
    """Dollars as nano-dollars; fractions below 1e-9 nano-dollars are rounded up."""
    amount = parse_amount(value)
    if amount is None or amount > _MAX_DOLLARS:
        raise _Unpriced
    dollars = amount.quantize(_SMALLEST_DOLLARS, ROUND_CEILING, EXACT)
    charged = EXACT.multiply(dollars, surcharge)
    if charged > _MAX_DOLLARS:
        raise _Unpriced
    nanos = charged.quantize(_SMALLEST_DOLLARS, ROUND_CEILING, EXACT).scaleb(9, EXACT)
    if nanos == nanos.to_integral_value():
        return nanos.quantize(Decimal(1), context=EXACT)  # `normalize` would write 500000000 as 5E+8
    return nanos.normalize(EXACT)


def _tiers(
    base: dict[str, Decimal], by_length: list[tuple[int, dict[str, Decimal]]]
) -> Iterable[tuple[int, dict[str, Decimal]]]:
    """The thresholds, ascending, each with the prices above it: those above the lower ones count, too."""
    prices = base
    for threshold, override in sorted(by_length, key=lambda entry: entry[0]):
        prices = _merged(prices, override)
        yield threshold, prices


def _merged(first: Mapping[str, Decimal], second: Mapping[str, Decimal]) -> dict[str, Decimal]:
    return {**first, **{name: max(price, first.get(name, ZERO)) for name, price in second.items()}}


def _rates(prices: Mapping[str, Decimal]) -> Rates:
    # What is priced as text may be billed for sound and images, too, so neither is ever cheaper than text.
    audio = _dearest_of(prices, *_INPUT, "audio", "input_audio_cache") if "audio" in prices else None
    return Rates(
        prompt=prices["prompt"],
        completion=prices["completion"],
        input=_dearest_of(prices, *_INPUT),
        output=_dearest_of(prices, *_OUTPUT),
        request=prices.get("request", ZERO),
        image=prices.get("image", ZERO),
        image_token=_dearest_of(prices, *_INPUT, "image_token"),
        web_search=prices.get("web_search", ZERO),
        audio=audio,
        image_output=prices.get("image_output"),
        audio_output=prices.get("audio_output"),
    )


def _dearest_of(prices: Mapping[str, Decimal], *names: str) -> Decimal:
    return max(prices.get(name, ZERO) for name in names)


def _dearer(first: Decimal | None, second: Decimal | None) -> Decimal | None:
    if first is None or second is None:
        return second if first is None else first
    return max(first, second)
