"""A model: its limits, modalities and parameters, and the providers that serve it at their own prices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from .pricing import Prices, parse_prices

Pricing: TypeAlias = Mapping[str, object]

# Values of `supported_parameters`: https://openrouter.ai/docs/guides/overview/models
SAMPLING = ("temperature", "top_p", "stop", "seed", "frequency_penalty", "presence_penalty")
CHAT = (
    "max_tokens",
    "max_completion_tokens",
    "response_format",
    "structured_outputs",
    "tools",
    "tool_choice",
    *SAMPLING,
)
THINKING = ("reasoning", "include_reasoning", *CHAT)
TEXT = ("text",)
VISION = ("text", "image")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One provider that serves a model, at its own prices."""

    provider: str
    tag: str
    pricing: Pricing
    prices: Prices

    @classmethod
    def of(cls, provider: str, pricing: Pricing) -> Endpoint:
        return cls(provider, provider.lower().replace(" ", "-"), pricing, parse_prices(pricing))


@dataclass(frozen=True, slots=True)
class Model:
    """A model. Its listed price is that of the first endpoint."""

    id: str
    name: str
    context: int
    max_completion: int | None
    endpoints: tuple[Endpoint, ...]
    parameters: tuple[str, ...] = CHAT
    inputs: tuple[str, ...] = TEXT
    outputs: tuple[str, ...] = TEXT
    created: int = 1_750_000_000
    reasoning: str = ""
    """`mandatory`, `optional` (off by default) or empty."""
    style: str = "openai"
    """The provider whose native finish reasons and reasoning format it uses."""
    stands_for: str = ""
    """The model to which a router model sends everything."""
    slug: str = ""
    """The dated name behind the id, where the two differ."""
    unit: str = "token"
    """The unit of the price `prompt` (of `audio`, for recordings): a token, a character or a second."""
    voices: tuple[str, ...] = ()

    def supports(self, parameter: str) -> bool:
        return parameter in self.parameters


def at(*endpoints: tuple[str, Pricing]) -> tuple[Endpoint, ...]:
    """Endpoints of providers and their `pricing` objects. The first one has the model's listed price."""
    return tuple(Endpoint.of(provider, pricing) for provider, pricing in endpoints)
