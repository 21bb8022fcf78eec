"""The scenarios: how a request can be answered on demand. They are defined here and nowhere else.

A scenario is named in the header `x-sandbox-scenario` or as a suffix of the model
(`openai/gpt-4o-mini:error-429`). It may have parameters (`slow;ms=50`), and several can be combined with
commas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from types import MappingProxyType

from .failures import FAILURES, Refusal, refusal
from .generation import FOREVER


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a request is answered. The defaults make an ordinary answer."""

    usage: str = "with-finish"
    """with-finish | empty-choices | null-finish | every-event | twice | missing"""
    done: bool = True
    cost: str = "plain"
    """How usage.cost is written: plain | missing | null | zero | negative | nan | string"""
    byok: bool = False
    cost_factor: Decimal = Decimal(1)
    """Multiplies the bill, whatever `provider.max_price` says."""
    price_factor: Decimal = Decimal(1)
    """Multiplies the prices before `provider.max_price` is checked."""
    rise_factor: Decimal = Decimal(0)
    """Makes the model dearer from now on, in the catalog too; 0 leaves its price."""
    cache: str = ""
    """read | write | hit"""
    comments: tuple[int, int] = (1, 0)
    """Comment lines before the first event, and before every later one."""
    comments_as_data: bool = False
    line_end: bytes = b"\n"
    piece: int = 0
    """Bytes per piece of the body; 0 sends every event whole."""
    failure: str = ""
    stream_error: str = ""
    """An error in mid-stream: code (a number) | string | empty (no choices)"""
    dies: bool = False
    body: str = ""
    """What a 200 (or 302) carries instead of an answer: error | error-choices | html | invalid | redirect"""
    compressed: bool = False
    delay: float = 0.0
    pace: float = 0.0
    halt: str = ""
    """Where the answer stops: start | middle (silence from there on), or cut (the connection is dropped)."""
    after: int = 4
    """The number of events before the fault."""
    late_lookups: int = 0
    fallback: bool = False
    dearer: bool = False
    calls_tool: bool = False
    thinks: bool = False
    tokens: int = 0
    padding: int = 0
    generation_header: bool = True


ORDINARY = Behaviour()


@dataclass(frozen=True, slots=True)
class Scenario:
    """A line for the documentation, and the fields of Behaviour that the scenario sets."""

    description: str
    changes: Mapping[str, object] = field(default_factory=dict)


MAX_PARAMETER = 10**9
# The name of each parameter, and the field of Behaviour that it sets.
_PARAMETERS = {
    "tokens": "tokens",
    "ms": "pace",
    "seconds": "delay",
    "count": "after",
    "times": "late_lookups",
    "bytes": "padding",
}

_TABLE: dict[str, Scenario] = {
    "ordinary": Scenario("An ordinary answer; `tokens=N` sets its length"),
    "usage-with-finish": Scenario(
        "Stream: usage in a last event that repeats the finish reason (as ordinary)"
    ),
    "usage-empty-choices": Scenario(
        "Stream: usage in a last event with `choices: []`", {"usage": "empty-choices"}
    ),
    "usage-null-finish": Scenario(
        "Stream: usage in a last event with finish_reason null", {"usage": "null-finish"}
    ),
    "usage-every-event": Scenario("Stream: running usage in every event", {"usage": "every-event"}),
    "usage-twice": Scenario("Stream: the usage event comes twice", {"usage": "twice"}),
    "usage-missing": Scenario("No usage at all, `[DONE]` as usual", {"usage": "missing"}),
    "usage-missing-no-done": Scenario(
        "No usage, and the stream ends without `[DONE]`", {"usage": "missing", "done": False}
    ),
    "no-done": Scenario("Stream: usage comes, `[DONE]` does not", {"done": False}),
    "keepalive": Scenario("Stream: comment lines before and between the events", {"comments": (3, 1)}),
    "comment-as-data": Scenario(
        "Stream: `data: : OPENROUTER PROCESSING`, as some proxies rewrite a comment",
        {"comments": (2, 0), "comments_as_data": True},
    ),
    "crlf": Scenario("Stream: lines end with CRLF", {"line_end": b"\r\n"}),
    "split-chunks": Scenario("UTF-8 characters and JSON are split over pieces of 7 bytes", {"piece": 7}),
    "tool-call": Scenario("A tool call in fragments, asked for or not", {"calls_tool": True}),
    "reasoning": Scenario("Reasoning deltas before the answer, asked for or not", {"thinks": True}),
    "stream-error": Scenario(
        "Stream: error with a number as code after `count` events", {"stream_error": "code"}
    ),
    "stream-error-string": Scenario(
        "Stream: error with a string as code after `count` events", {"stream_error": "string"}
    ),
    "stream-error-empty": Scenario(
        "Stream: error with `choices: []` after `count` events", {"stream_error": "empty"}
    ),
    "error-first": Scenario("Stream: an error is the first event", {"stream_error": "code", "after": 0}),
    "error-in-200": Scenario(
        "Status 200 with an error as JSON, also where a stream was asked for", {"body": "error"}
    ),
    "error-in-200-choices": Scenario("The same, with choices beside the error", {"body": "error-choices"}),
    "provider-died": Scenario("Partial content with finish_reason `error`, status 200", {"dies": True}),
    "cost-null": Scenario("usage.cost is null; /generation knows it", {"cost": "null"}),
    "cost-missing": Scenario(
        "usage without cost, as the schema of /messages has it; /generation knows it", {"cost": "missing"}
    ),
    "cost-zero": Scenario(
        "usage.cost is 0, and nothing is billed", {"cost": "zero", "cost_factor": Decimal(0)}
    ),
    "cost-negative": Scenario(
        "usage.cost is negative; /generation knows the true cost", {"cost": "negative"}
    ),
    "cost-nan": Scenario("usage.cost is NaN; /generation knows the true cost", {"cost": "nan"}),
    "cost-string": Scenario("usage.cost is a string", {"cost": "string"}),
    "cost-above-hold": Scenario(
        "The bill is `factor` (100) times what prices allow", {"cost_factor": Decimal(100)}
    ),
    "byok": Scenario("Own key at the provider: cost 0, the price in cost_details", {"byok": True}),
    "cache-read": Scenario("Most of the prompt is read from the provider's cache", {"cache": "read"}),
    "cache-write": Scenario("Most of the prompt is written to the provider's cache", {"cache": "write"}),
    "cache-hit": Scenario("OpenRouter's response cache answers: zeroed usage, HIT headers", {"cache": "hit"}),
    "price-change": Scenario(
        "This request's prices are `factor` (2) times the listed ones, before max_price is checked",
        {"price_factor": Decimal(2)},
    ),
    "price-rise": Scenario(
        "The model's prices rise to `factor` (2) times, in the catalog too, for 5 minutes: "
        "refused for max_price until /models is read",
        {"rise_factor": Decimal(2)},
    ),
    "fallback": Scenario(
        "Another model answers: the second of `models`, else the cheapest", {"fallback": True}
    ),
    "dearer-provider": Scenario("The dearest endpoint of the model answers", {"dearer": True}),
    "gzip": Scenario("The body is gzip, although identity was asked for", {"compressed": True}),
    "slow-first-token": Scenario("The first token takes `seconds` (60)", {"delay": 60.0}),
    "slow": Scenario("Events are `ms` (200) apart; `tokens=N` sets how many", {"pace": 0.2}),
    "hang": Scenario("No answer at all, until the client leaves", {"halt": "start"}),
    "stall": Scenario("Silence after `count` events, until the client leaves", {"halt": "middle"}),
    "cut": Scenario(
        "The connection is dropped in the middle of an event, after `count` events", {"halt": "cut"}
    ),
    "abort": Scenario(
        "Slow, for aborting: /generation says cancelled after `times` (2) lookups of 404",
        {"pace": 0.2, "late_lookups": 2, "tokens": 40},
    ),
    "generation-late": Scenario(
        "/generation answers 404 to the first `times` (2) lookups", {"late_lookups": 2}
    ),
    "generation-lost": Scenario("/generation never finds it", {"late_lookups": FOREVER}),
    "no-generation-id": Scenario("No X-Generation-Id header", {"generation_header": False}),
    "redirect": Scenario("302 to another host", {"body": "redirect"}),
    "html-body": Scenario("Status 200 with an HTML page", {"body": "html"}),
    "invalid-json": Scenario("Status 200 with JSON that ends too early", {"body": "invalid"}),
    "oversized": Scenario("An answer of `bytes` (8388608)", {"padding": 8 * 1024 * 1024}),
    **{name: Scenario(failure.description, {"failure": name}) for name, failure in FAILURES.items()},
}

SCENARIOS: Mapping[str, str] = MappingProxyType(
    {name: scenario.description for name, scenario in _TABLE.items()}
)


def parse_scenarios(text: str) -> dict[str, object]:
    """The changes that a header or suffix demands; raises Refusal (400) for an unknown scenario."""
    changes: dict[str, object] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        changes |= _parse_scenario(part)
    return changes


def _parse_scenario(text: str) -> dict[str, object]:
    name, *parameters = (piece.strip() for piece in text.split(";"))
    scenario = _TABLE.get(name)
    if scenario is None:
        raise refusal(400, _unknown(name))
    changes = dict(scenario.changes)
    for parameter in parameters:
        changes |= _parse_parameter(scenario, parameter)
    return changes


def _unknown(name: str) -> str:
    """A message short enough to pass through any proxy: the likeliest names, not all there are."""
    close = get_close_matches(name, SCENARIOS, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"Unknown sandbox scenario {name[:40]!r}.{hint} docs/sandbox.md lists them all."


def split_model(model: str) -> tuple[str, dict[str, object]]:
    """A model id without its scenario suffixes, and what those change."""
    changes: dict[str, object] = {}
    while ":" in model:
        rest, _, suffix = model.rpartition(":")
        # OpenRouter's own variants, such as :free, belong to the model id.
        if suffix.split(";")[0] not in _TABLE:
            break
        model, changes = rest, parse_scenarios(suffix) | changes
    return model, changes


def build_behaviour(changes: Mapping[str, object]) -> Behaviour:
    """The behaviour with these fields changed."""
    if not changes:
        return ORDINARY
    return replace(ORDINARY, **changes)  # type: ignore[arg-type]  # names and values come from the table


def _parse_parameter(scenario: Scenario, text: str) -> dict[str, object]:
    name, _, value = text.partition("=")
    number = _read_number(value)
    field_name = _factor_of(scenario) if name == "factor" else _PARAMETERS.get(name, "")
    if not field_name or number is None:
        raise _unknown_parameter(scenario, text)
    if field_name.endswith("factor"):
        return {field_name: number}
    if field_name in ("pace", "delay"):
        return {field_name: float(number) / (1000 if name == "ms" else 1)}
    return {field_name: int(number)}


def _read_number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() and 0 <= number <= MAX_PARAMETER else None


def _unknown_parameter(scenario: Scenario, text: str) -> Refusal:
    known = ", ".join([*_PARAMETERS, *(["factor"] if _factor_of(scenario) else [])])
    return refusal(
        400,
        f"Not a parameter of this sandbox scenario: {text[:40]!r}. "
        f"Known: {known}, each a number up to {MAX_PARAMETER}.",
    )


def _factor_of(scenario: Scenario) -> str:
    """The field that the parameter `factor` sets, if the scenario has one."""
    return next((name for name in scenario.changes if name.endswith("factor")), "")
