"""OpenRouter's price strings, tiers and discounts, in exact decimals.

https://openrouter.ai/docs/guides/overview/models: every price is in US dollars for a single unit. An override
applies when the prompt has strictly more tokens than its `min_prompt_tokens`. A discount multiplies prices by
(1 - discount).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from typing import Any

ZERO = Decimal(0)
ONE = Decimal(1)
MILLION = Decimal(1_000_000)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is billed.

    `cached`, `cache_write` and `audio_in` are parts of `prompt`. `reasoning`, `audio_out` and `image_out` are
    parts of `completion`.
    """

    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    cached: int = 0
    cache_write: int = 0
    images: int = 0
    searches: int = 0
    audio_in: int = 0
    audio_out: int = 0
    image_out: int = 0
    units: int = 1
    """How many fees per request are due: one, or one for every search unit of a rerank request."""


@dataclass(frozen=True, slots=True)
class Cost:
    """US dollars, exactly. The fees for the request, images and searches are part of the prompt's cost."""

    prompt: Decimal
    completion: Decimal

    @property
    def total(self) -> Decimal:
        return self.prompt + self.completion

    def __mul__(self, factor: Decimal) -> Cost:
        return Cost(self.prompt * factor, self.completion * factor)


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars per unit, as one endpoint charges them."""

    prompt: Decimal
    completion: Decimal
    request: Decimal = ZERO
    image: Decimal = ZERO
    web_search: Decimal = ZERO
    input_cache_read: Decimal | None = None
    input_cache_write: Decimal | None = None
    audio: Decimal | None = None
    audio_output: Decimal | None = None
    image_output: Decimal | None = None
    overrides: tuple[tuple[int, Prices], ...] = ()

    def __mul__(self, factor: Decimal) -> Prices:
        if factor == ONE:
            return self
        priced = {name: getattr(self, name) for name in _COMPONENTS}
        scaled = {name: price * factor for name, price in priced.items() if price is not None}
        return Prices(**scaled, overrides=tuple((least, tier * factor) for least, tier in self.overrides))

    def cost(self, tokens: Tokens) -> Cost:
        """The cost of these tokens, at the tier of their prompt."""
        return self._tier(tokens.prompt)._cost(tokens)

    def _tier(self, prompt: int) -> Prices:
        tier = self
        for least, prices in self.overrides:
            if prompt > least:
                tier = prices
        return tier

    def _cost(self, tokens: Tokens) -> Cost:
        # Tokens without a price of their own cost as much as ordinary ones.
        fresh = tokens.prompt - tokens.cached - tokens.cache_write - tokens.audio_in
        prompt = (
            fresh * self.prompt
            + tokens.cached * _or(self.input_cache_read, self.prompt)
            + tokens.cache_write * _or(self.input_cache_write, self.prompt)
            + tokens.audio_in * _or(self.audio, self.prompt)
        )
        fees = tokens.units * self.request + tokens.images * self.image + tokens.searches * self.web_search
        completion = (
            (tokens.completion - tokens.audio_out - tokens.image_out) * self.completion
            + tokens.audio_out * _or(self.audio_output, self.completion)
            + tokens.image_out * _or(self.image_output, self.completion)
        )
        return Cost(prompt + fees, completion)

    def exceeds(self, maximum: Mapping[str, Decimal]) -> bool:
        """Whether `provider.max_price` forbids this endpoint."""
        # https://openrouter.ai/docs/features/provider-routing: prompt and completion are per million tokens
        # there.
        prices = {
            "prompt": self.prompt * MILLION,
            "completion": self.completion * MILLION,
            "request": self.request,
            "image": self.image,
        }
        return any(price > maximum[name] for name, price in prices.items() if name in maximum)


_COMPONENTS = tuple(field.name for field in fields(Prices) if field.name != "overrides")


def _or(price: Decimal | None, otherwise: Decimal) -> Decimal:
    return otherwise if price is None else price


def parse_prices(pricing: Mapping[str, object]) -> Prices:
    """The prices in a `pricing` object of `/models`."""
    overrides = pricing.get("overrides")
    tiers = tuple(
        (int(override["min_prompt_tokens"]), _base_prices({**pricing, **override}))
        for override in (overrides if isinstance(overrides, list) else [])
    )
    discount = Decimal(str(pricing.get("discount", 0)))
    return replace(_base_prices(pricing), overrides=tiers) * (ONE - discount)


def _base_prices(pricing: Mapping[str, object]) -> Prices:
    prices: dict[str, Any] = {
        name: Decimal(str(value)) for name, value in pricing.items() if name in _COMPONENTS
    }
    return Prices(**prices)
