"""CostDrivers: what costs money in a request body, and the readers of single fields that fill it in.

Reading a field must never raise anything but a GatewayError that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from common.errors import BadRequest, UnboundedCost
from common.json_types import Json, JsonObject
from common.money import parse_amount
from gateway.pricing.catalog import LIMIT_FIELDS, Model

CHAT_LIMITS = tuple(sorted(LIMIT_FIELDS))
MODALITIES = frozenset(("text", "image", "audio"))

# Prompt tokens that the provider's side adds: templates and default system prompts for each request; for each
# message; for tools, once and each; for a schema.
REQUEST_TOKENS, MESSAGE_TOKENS, TOOLS_TOKENS, TOOL_TOKENS, SCHEMA_TOKENS = 256, 16, 1_024, 64, 1_024

# Output tokens of one image. Images priced by their size are listed by the token, 4,096 to a megapixel, and
# have 4.2 megapixels at most unless asked for; the others stay below: gemini-2.5-flash-image 1,290, gpt-image
# about 6,240.
TOKENS_PER_MEGAPIXEL = 4_096
IMAGE_OUTPUT_TOKENS = 5 * TOKENS_PER_MEGAPIXEL
LARGE_IMAGE_OUTPUT_TOKENS = 17 * TOKENS_PER_MEGAPIXEL  # 4096 x 4096 pixels, or a size that is not understood


@dataclass(slots=True)
class CostDrivers:
    """What a body of `raw_size` bytes asks for, as far as it costs money. The readers of its parts fill it
    in.
    """

    raw_size: int
    limit_names: tuple[str, ...] = CHAT_LIMITS  # the endpoint's output limits; (): models write what they can
    has_output: bool = True
    is_text: bool = True  # priced by tokens of a context: never more of them than the context length
    choices: int = 1
    inputs: int = 1
    requests: int = 1  # how often the fee for a request falls due
    allowance: int = REQUEST_TOKENS  # prompt tokens that the body does not show
    least_input: int = 0  # units of input (tokens, seconds) that count whatever the body's size is
    media_bytes: int = 0  # of the body, which are no text
    images: int = 0
    made_images: int = 0  # images that are asked for outright, beside those that a chat may bring
    image_tokens: int = IMAGE_OUTPUT_TOKENS  # output tokens of one image
    has_audio: bool = False
    seconds: int | None = None  # of a recording that is all there is to read, where its length is known
    has_files: bool = False
    fills_context: bool = False  # the prompt holds what the body does not show
    pdf_engine: str | None = None
    search_results: int = 0  # of the web plugin
    plugins: list[Json] = field(default_factory=list)  # as they are sent, without the router's
    routing: JsonObject | None = None  # the router's plugin: which models it may pick
    modalities: frozenset[str] | None = None  # of the output, where the body names them
    limits: dict[str, int] = field(default_factory=dict)  # the client's own output limits, by field
    provider: JsonObject = field(default_factory=dict)
    takes_provider: bool = True  # the outgoing body can hold `provider`
    client_caps: dict[str, Decimal] = field(default_factory=dict)  # the client's own `provider.max_price`
    tool_steps: int = 0  # of the loop in which OpenRouter runs server tools; 0: there is none
    native_turns: int = 0  # of the loop in which the provider runs its own search; 0: there is none
    tool_cost: Decimal | None = None  # nano-dollars after which OpenRouter's loop ends
    tool_searches: int = 0  # that tools may make
    tool_results: int = 0  # the most results of one of them
    patch: dict[str, Json] = field(default_factory=dict)  # body fields to replace

    def outputs(self, model: Model) -> frozenset[str]:
        """The modalities that may come out: those that are asked for, else whatever the model can do.

        A model that has none of those that are asked for still puts out what it can.
        """
        if not self.has_output:
            return frozenset()
        if not self.is_text and self.modalities is not None:
            return self.modalities  # what the endpoint makes, whatever the list calls it
        able = model.output_modalities or MODALITIES
        return able if self.modalities is None or self.modalities.isdisjoint(able) else self.modalities

    @property
    def turns(self) -> int:
        """How often the model may be called. When a loop ends, pending tool calls still run, and a last turn
        follows.
        """
        return max(self.native_turns, self.tool_steps + 2) if self.tool_steps else 1

    @property
    def has_media(self) -> bool:
        return bool(self.images) or self.has_files or self.has_audio

    @property
    def is_hidden(self) -> bool:
        """Whether the prompt may hold more than the body shows, up to the context length."""
        adds_results = self.search_results > 0 or self.tool_steps > 0
        return self.has_files or self.has_audio or self.fills_context or adds_results


def wrong(param: str, must: str) -> BadRequest:
    """The error for a field that is not what it must be."""
    return BadRequest(f"`{param}` must be {must}.", param=param)


def refuse_foreign(body: JsonObject, *params: str) -> None:
    """Refuses fields of other endpoints: nothing documents what they would do here."""
    for param in params:
        if body.get(param) is not None:
            raise BadRequest(f"`{param}` does not belong to this endpoint.", param=param)


def refuse_unbounded(body: JsonObject, reasons: Mapping[str, str]) -> None:
    """Refuses the fields that are named, each for its reason."""
    for param, reason in reasons.items():
        if body.get(param) is not None:
            raise UnboundedCost(reason, param=param)


def list_of(body: JsonObject, name: str, prefix: str = "") -> list[Json]:
    """The list in a field, empty without one. `prefix` stands before the name in an error."""
    value = body.get(name)
    if value is not None and not isinstance(value, list):
        raise wrong(prefix + name, "a list")
    return value or []


def require_list(body: JsonObject, name: str, element: str) -> list[Json]:
    """The list in a required field, with at least one element."""
    elements = list_of(body, name)
    if not elements:
        raise wrong(name, f"a list of at least one {element}")
    return elements


def object_of(value: Json, param: str) -> dict[str, Json]:
    """The object that a value is, empty for none."""
    if value is not None and not isinstance(value, dict):
        raise wrong(param, "an object" if param not in ("plugins", "tools") else "a list of objects")
    return value or {}


def integer(body: JsonObject, name: str, high: int | None = None, prefix: str = "") -> int | None:
    """The integer in a field, from 1 to `high`; None without one."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= (high or value):
        raise wrong(prefix + name, f"an integer from 1 to {high}" if high else "an integer of at least 1")
    return value


def text_of(body: JsonObject, name: str) -> str:
    """The text in a required field."""
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise wrong(name, "a string of at least one character")
    return value


def price_of(value: Json, param: str) -> Decimal:
    """A client's amount of dollars. The range spares the gateway and the upstream numbers of a million
    digits.
    """
    amount = parse_amount(repr(value) if isinstance(value, float) else value)
    if amount is None or (amount and not -30 < amount.adjusted() < 30):
        raise wrong(param, "given in dollars: zero, or numbers between 1e-29 and 1e29")
    return amount


def choice_of(value: Json, known: frozenset[str], what: str, param: str) -> str:
    """One of the known choices. Raises UnboundedCost for any other."""
    if not isinstance(value, str) or value not in known:
        names = ", ".join(sorted(known))
        raise UnboundedCost(f"{what} must be one of {names}: others have no bound.", param=param)
    return value
