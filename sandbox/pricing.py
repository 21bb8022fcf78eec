"""What does it cost? OpenRouter's price strings, tiers and discounts, in exact decimals.

Facts: https://openrouter.ai/docs, model schema: every price is US dollars per single unit; an override applies when the
prompt has strictly more tokens than its `min_prompt_tokens`; a discount multiplies prices by (1 - discount).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

ZERO = Decimal(0)
ONE = Decimal(1)
MILLION = Decimal(1_000_000)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is billed. `cached` and `cache_write` are parts of `prompt`, `reasoning` is a part of `completion`."""

    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    cached: int = 0
    cache_write: int = 0
    images: int = 0
    searches: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """US dollars, exactly; request, image and search fees count to the prompt."""

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
    overrides: tuple[tuple[int, Prices], ...] = ()

    def __mul__(self, factor: Decimal) -> Prices:
        if factor == ONE:
            return self
        read, write = self.input_cache_read, self.input_cache_write
        return Prices(
            prompt=self.prompt * factor,
            completion=self.completion * factor,
            request=self.request * factor,
            image=self.image * factor,
            web_search=self.web_search * factor,
            input_cache_read=None if read is None else read * factor,
            input_cache_write=None if write is None else write * factor,
            overrides=tuple((least, tier * factor) for least, tier in self.overrides),
        )

    def cost(self, tokens: Tokens) -> Cost:
        """The bill for these tokens, at the tier of their prompt."""
        tier = self
        for least, prices in self.overrides:
            if tokens.prompt > least:
                tier = prices
        read = tier.prompt if tier.input_cache_read is None else tier.input_cache_read
        write = tier.prompt if tier.input_cache_write is None else tier.input_cache_write
        fresh = tokens.prompt - tokens.cached - tokens.cache_write
        fees = tier.request + tokens.images * tier.image + tokens.searches * tier.web_search
        prompt = fresh * tier.prompt + tokens.cached * read + tokens.cache_write * write + fees
        return Cost(prompt, tokens.completion * tier.completion)

    def exceeds(self, maximum: Mapping[str, Decimal]) -> bool:
        """Whether `provider.max_price` forbids this endpoint (prompt and completion are per million tokens there)."""
        asked = {
            "prompt": self.prompt * MILLION,
            "completion": self.completion * MILLION,
            "request": self.request,
            "image": self.image,
        }
        return any(price > maximum[name] for name, price in asked.items() if name in maximum)


def parse_prices(pricing: Mapping[str, object]) -> Prices:
    """Prices out of a `pricing` object in the shape of `/models`."""
    overrides = pricing.get("overrides")
    tiers = tuple(
        (int(override["min_prompt_tokens"]), _base_prices({**pricing, **override}))
        for override in (overrides if isinstance(overrides, list) else [])
    )
    discount = Decimal(str(pricing.get("discount", 0)))
    return replace(_base_prices(pricing), overrides=tiers) * (ONE - discount)


def _base_prices(pricing: Mapping[str, object]) -> Prices:
    known = {name: Decimal(str(value)) for name, value in pricing.items() if isinstance(value, str)}
    return Prices(
        prompt=known["prompt"],
        completion=known["completion"],
        request=known.get("request", ZERO),
        image=known.get("image", ZERO),
        web_search=known.get("web_search", ZERO),
        input_cache_read=known.get("input_cache_read"),
        input_cache_write=known.get("input_cache_write"),
    )
