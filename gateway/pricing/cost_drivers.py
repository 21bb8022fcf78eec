"""CostDrivers: what of a body costs money, and readers of single fields. The vocabulary of the body readers.

Reading a field must never raise anything but a GatewayError that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from common.errors import BadRequest, UnboundedCost
from common.money import parse_amount
from gateway.pricing.catalog import LIMIT_FIELDS, Model

CHAT_LIMITS = tuple(sorted(LIMIT_FIELDS))
MODALITIES = frozenset(("text", "image", "audio"))

# Tokens that the provider's side adds: templates and default system prompts; once and for each tool; for a
# schema.
REQUEST_TOKENS, MESSAGE_TOKENS, TOOLS_TOKENS, TOOL_TOKENS, SCHEMA_TOKENS = 256, 16, 1_024, 64, 1_024

# Output tokens of one image. Images priced by their size are listed by the token, 4,096 to a megapixel, and
# have 4.2 megapixels at most unless asked for; the others stay below: gemini-2.5-flash-image 1,290, gpt-image
# about 6,240.
TOKENS_PER_MEGAPIXEL = 4_096
IMAGE_OUTPUT_TOKENS = 5 * TOKENS_PER_MEGAPIXEL
LARGE_IMAGE_OUTPUT_TOKENS = 17 * TOKENS_PER_MEGAPIXEL  # 4096 x 4096 pixels, or a size that is not understood


@dataclass(slots=True)
class CostDrivers:
    """What a body of `raw_size` bytes asks for, as far as it costs money."""

    raw_size: int
    limit_names: tuple[str, ...] = (
        CHAT_LIMITS  # the endpoint's output limits; none: the models write what they can
    )
    has_output: bool = True
    is_text: bool = True  # priced by tokens of a context: never more of them than the context length
    choices: int = 1
    inputs: int = 1
    requests: int = 1  # how often the fee for a request falls due
    allowance: int = REQUEST_TOKENS
    least_input: int = 0  # units of input (tokens, seconds) that count whatever the body's size is
    media_bytes: int = 0  # of the body, which are no text
    images: int = 0
    made_images: int = 0  # images that are asked for outright, beside those that a chat may bring
    image_tokens: int = IMAGE_OUTPUT_TOKENS  # output tokens of one image
    has_audio: bool = False
    seconds: int | None = None  # of a recording that is all there is to read, where its length is known
    has_files: bool = False
    fills_context: bool = False  # the prompt holds what we do not see
    pdf_engine: str | None = None
    search_results: int = 0
    plugins: list[Mapping[str, Any]] = field(default_factory=list)  # as they are sent, but for the router's
    routing: Mapping[str, Any] | None = None  # the router's plugin: which models it may pick
    modalities: frozenset[str] | None = None
    limits: dict[str, int] = field(default_factory=dict)
    provider: Mapping[str, Any] = field(default_factory=dict)
    takes_provider: bool = True  # the outgoing body can hold `provider`
    own_max_price: dict[str, Decimal] = field(default_factory=dict)
    tool_steps: int = 0  # of the loop in which OpenRouter runs server tools; 0: there is none
    native_turns: int = 0  # of the loop in which the provider runs its own search; 0: there is none
    tool_cost: Decimal | None = None  # nano-dollars after which OpenRouter's loop ends
    tool_searches: int = 0  # that tools may make
    tool_results: int = 0  # the most results of one of them
    patch: dict[str, Any] = field(default_factory=dict)

    def outputs(self, model: Model) -> frozenset[str]:
        """The modalities that may come out: those asked for, else whatever the model can do.

        A model that has none of those asked for puts out what it can all the same.
        """
        if not self.has_output:
            return frozenset()
        if not self.is_text and self.modalities is not None:
            return self.modalities  # what the endpoint makes, whatever the list calls it
        able = model.output_modalities or MODALITIES
        return able if self.modalities is None or self.modalities.isdisjoint(able) else self.modalities

    @property
    def turns(self) -> int:
        """How often the model may be called. When a loop ends, calls that are pending still run, and a last
        turn follows.
        """
        return max(self.native_turns, self.tool_steps + 2) if self.tool_steps else 1

    @property
    def has_media(self) -> bool:
        return bool(self.images) or self.has_files or self.has_audio

    @property
    def is_hidden(self) -> bool:
        """Whether the prompt may hold more than the body shows, up to the context length."""
        return (
            self.has_files
            or self.has_audio
            or self.fills_context
            or self.search_results > 0
            or self.tool_steps > 0
        )


def wrong(param: str, must: str) -> BadRequest:
    return BadRequest(f"`{param}` must be {must}.", param=param)


def refuse_foreign(body: Mapping[str, Any], *params: str) -> None:
    """Fields of other endpoints: what they would do here is nobody's promise."""
    for param in params:
        if body.get(param) is not None:
            raise BadRequest(f"`{param}` does not belong to this endpoint.", param=param)


def refuse_unbounded(body: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    if fields.keys().isdisjoint(body):
        return
    for param, why in fields.items():
        if body.get(param) is not None:
            raise UnboundedCost(why, param=param)


def list_of(body: Mapping[str, Any], name: str, prefix: str = "") -> list[Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, list):
        raise wrong(prefix + name, "a list")
    return value or []


def object_of(value: object, param: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise wrong(param, "an object" if param not in ("plugins", "tools") else "a list of objects")
    return value or {}


def integer(body: Mapping[str, Any], name: str, high: int | None = None, prefix: str = "") -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < 1
        or (high is not None and value > high)
    ):
        raise wrong(prefix + name, f"an integer from 1 to {high}" if high else "an integer of at least 1")
    return value


def text_of(body: Mapping[str, Any], name: str) -> str:
    """A required text."""
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise wrong(name, "a string of at least one character")
    return value


def price_of(value: object, param: str) -> Decimal:
    """A client's amount of dollars. The range spares us and the upstream numbers of a million digits."""
    amount = parse_amount(repr(value) if isinstance(value, float) else value)
    if amount is None or (amount and not -30 < amount.adjusted() < 30):
        raise wrong(param, "given in dollars: zero, or numbers between 1e-29 and 1e29")
    return amount


def choice_of(value: object, known: frozenset[str], what: str, param: str) -> str:
    if not isinstance(value, str) or value not in known:
        raise UnboundedCost(
            f"{what} must be one of {', '.join(sorted(known))}: others have no bound.", param=param
        )
    return value
