"""OpenRouter's model list in memory, refreshed by one fetch at a time.

One odd entry must never hide the other models, and a request must never wait while there is a list.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from common.errors import GatewayError, UpstreamUnavailable
from common.json_types import Json, JsonObject
from gateway.pricing.prices import Markups, Price, markups, parse_price

log = logging.getLogger(__name__)

RETRY_SECONDS = 10.0
LIMIT_FIELDS = frozenset(("max_tokens", "max_completion_tokens"))
MAX_TOKENS = 2**31 - 1

# These change how a request is routed, not which model serves it, and are never in the list themselves.
# Source: https://openrouter.ai/docs/guides/routing/model-variants/overview
ROUTING_SUFFIXES = frozenset(("nitro", "floor", "exacto", "online"))

# The router whose cost has a bound: it picks one model, and `provider.max_price` filters that model's
# endpoints. Other routers ask several models. Source:
# https://openrouter.ai/docs/guides/routing/routers/auto-router
ROUTER = "openrouter/auto"


@dataclass(frozen=True, slots=True)
class Model:
    """What a bound needs to know of a model. Lengths are tokens; None is unknown."""

    id: str
    price: Price | None  # None: nothing bounds its cost, unless it is a router whose prices the client caps
    context_length: int | None  # the longest that any provider is known to offer
    max_output: int | None  # the top provider's, else the context length
    limit_fields: frozenset[str]  # those of LIMIT_FIELDS that the model lists among its supported parameters
    output_modalities: frozenset[str] | None
    searches: bool  # it may search the web without being asked to (search previews, Perplexity)

    @property
    def is_router(self) -> bool:
        return self.price is None and self.id == ROUTER


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """The state of the cache. Ages are seconds; `is_valid` means younger than the time to live."""

    has_data: bool
    cache_age_seconds: float | None
    ttl_seconds: float
    is_valid: bool
    total_cached_models: int


class ModelIndex:
    """One model list: as the upstream wrote it (`raw`), as JSON ready to send, and by id."""

    __slots__ = ("_by_id", "_markups", "json", "raw")

    def __init__(self, raw: list[dict[str, Json]], models: Iterable[Model]) -> None:
        self.raw = raw
        self.json = _list_json(raw, len(raw), None)
        self._by_id = {model.id: model for model in models}
        self._markups: Markups | None = None

    @property
    def listed(self) -> bytes:
        """The list alone, as JSON."""
        return self.json[len(b'{"data":') : self.json.rindex(b',"total_count":')]

    @property
    def markups(self) -> Markups:
        """How far the bill of any model can exceed the prices that can be capped: what a router may meet."""
        if self._markups is None:
            self._markups = markups(
                model.price
                for model in self._by_id.values()
                if model.price is not None and "text" in (model.output_modalities or ("text",))
            )
        return self._markups

    @property
    def uncapped(self) -> list[str]:
        """The ids of the models for text that no price cap bounds: they search by themselves, or may put out
        media, too.
        """
        models = self._by_id.values()
        return [model.id for model in models if model.searches or _puts_out_text_and_more(model)]

    def page(self, offset: int, limit: int | None, path: str) -> bytes:
        """A page of the list as JSON, with the path and query of the next one, if there is one."""
        end = len(self.raw) if limit is None else offset + limit
        following = f"{path}?offset={end}&limit={limit}" if end < len(self.raw) else None
        return _list_json(self.raw[offset:end], len(self.raw), following)

    def entry(self, model_id: str) -> dict[str, Json] | None:
        """The model of exactly this id, as the upstream wrote it."""
        return next((entry for entry in self.raw if entry.get("id") == model_id), None)

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, model_id: str) -> Model | None:
        """The model of exactly this id."""
        return self._by_id.get(model_id)

    def resolve(self, name: str, *, more_suffixes: frozenset[str] = frozenset()) -> Model | None:
        """The model that serves a name: the one of exactly this id, else of the id without its routing
        suffixes.

        Suffixes that are models of their own (`:free`, `:thinking`, `:extended`) never fall back to the plain
        model.
        """
        model = self._by_id.get(name)
        if model is not None or ":" not in name:
            return model
        return self._by_id.get(_without_routing(name, more_suffixes))


class Catalog:
    """The current model list. `fetch` returns the body of GET /models?output_modalities=all.

    One fetch runs at a time and all callers wait for the same one; a caller that is cancelled leaves it
    running for the others. A list older than `ttl_seconds` is still served while it is replaced in the
    background. A failed refresh is recorded in `last_error`, and not repeated for RETRY_SECONDS (or the time
    to live, if shorter) as long as there is a list to serve.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[bytes]],
        *,
        ttl_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.last_error: BaseException | None = None
        self._fetch = fetch
        self._ttl = ttl_seconds
        self._clock = clock
        self._index: ModelIndex | None = None
        self._loaded_at = 0.0
        self._retry_at = 0.0
        self._forced_at = float("-inf")
        self._refreshing: asyncio.Task[ModelIndex] | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether `models` returns without asking the upstream."""
        return self._index is not None and (self._refreshing is not None or not self._is_due())

    async def models(self) -> ModelIndex:
        """The model list, at most a moment older than the time to live while the upstream answers.

        Raises UpstreamUnavailable when there has never been one and it cannot be fetched now.
        """
        if self._index is None:
            return await self.refresh()
        if self._is_due():
            self._start()
        return self._index

    async def refresh(self) -> ModelIndex:
        """The model list as the upstream has it now. Raises UpstreamUnavailable; what is held remains."""
        try:
            return await asyncio.shield(self._start())
        except (GatewayError, OSError, ValueError, RecursionError) as error:
            message = "The model list of the upstream cannot be fetched now. Try again."
            raise UpstreamUnavailable(message) from error

    async def refresh_within(self, seconds: float) -> ModelIndex:
        """The same, at most once in so many seconds; in between, the list that is held or under way."""
        now = self._clock()
        if self._index is not None and now - self._forced_at < seconds and self._refreshing is None:
            return self._index
        self._forced_at = now
        return await self.refresh()

    def status(self) -> CacheStatus:
        """How old the list is and how many models it holds."""
        age = None if self._index is None else self._clock() - self._loaded_at
        return CacheStatus(
            has_data=self._index is not None,
            cache_age_seconds=age,
            ttl_seconds=self._ttl,
            is_valid=age is not None and age < self._ttl,
            total_cached_models=0 if self._index is None else len(self._index),
        )

    async def aclose(self) -> None:
        """Stop a refresh that is still under way."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])

    def _is_due(self) -> bool:
        now = self._clock()
        return now - self._loaded_at >= self._ttl and (self.last_error is None or now >= self._retry_at)

    def _start(self) -> asyncio.Task[ModelIndex]:
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._load(), name="refresh of the model list")
            self._refreshing.add_done_callback(self._finish)
        return self._refreshing

    async def _load(self) -> ModelIndex:
        payload = await self._fetch()
        # Parsing takes tens of milliseconds, in which the event loop would send no stream's next event.
        return await asyncio.to_thread(read_models, payload)

    def _finish(self, task: asyncio.Task[ModelIndex]) -> None:
        self._refreshing = None
        if task.cancelled():
            return
        self.last_error = error = task.exception()
        if error is None:
            self._index = task.result()
            self._loaded_at = self._clock()
            return
        self._retry_at = self._clock() + min(self._ttl, RETRY_SECONDS)
        cause = error.__cause__ or error
        reason = cause.__cause__ or cause
        log.warning("The model list cannot be refreshed: %s: %s", type(cause).__name__, reason)


def read_models(payload: bytes) -> ModelIndex:
    """The index of the body of GET /models. Raises ValueError for a body that is none, or holds no usable
    model.

    It is parsed twice: as plain JSON to be listed to clients, and with exact decimals for the prices.
    """
    raw = _entries(json.loads(payload, parse_float=_finite, parse_constant=_null))
    exact = _entries(json.loads(payload, parse_float=_exact, parse_constant=_null))
    models = [model for entry in exact if (model := parse_model(entry)) is not None]
    if not models:
        raise ValueError("the model list holds no model")
    return ModelIndex(raw, models)


def upstream_json(value: Mapping[str, object]) -> bytes:
    """JSON of values that an upstream wrote. orjson would refuse lone surrogates and long integers, and then
    one odd entry would hide all others.
    """
    return json.dumps(value, separators=(",", ":")).encode()


def parse_model(entry: JsonObject) -> Model | None:
    """The model of an entry, or None without an id. Parts that cannot be read are unknown, the rest still
    counts.
    """
    model_id = entry.get("id")
    if not isinstance(model_id, str) or not model_id:
        return None
    provider = _object(entry.get("top_provider"))
    context = _context_length(entry, provider)
    parameters = _strings(entry.get("supported_parameters")) or frozenset()
    price = parse_price(entry.get("pricing"))
    return Model(
        id=model_id,
        price=price,
        context_length=context,
        max_output=_tokens(provider.get("max_completion_tokens")) or context,
        limit_fields=LIMIT_FIELDS & parameters,
        output_modalities=_strings(_object(entry.get("architecture")).get("output_modalities")),
        searches="web_search_options" in parameters and price is not None and price.base.web_search > 0,
    )


def _context_length(entry: JsonObject, provider: JsonObject) -> int | None:
    """The longer of the model's and its top provider's, of those that are known."""
    lengths = [_tokens(part.get("context_length")) for part in (entry, provider)]
    return max(filter(None, lengths), default=None)


def _without_routing(name: str, more_suffixes: frozenset[str]) -> str:
    base, *suffixes = name.split(":")
    naming = [
        suffix
        for suffix in suffixes
        if suffix not in ROUTING_SUFFIXES and suffix.partition(";")[0] not in more_suffixes
    ]
    return ":".join((base, *naming))


def _list_json(entries: Sequence[JsonObject], total: int, following: str | None) -> bytes:
    return upstream_json({"data": entries, "total_count": total, "links": {"next": following}})


def _puts_out_text_and_more(model: Model) -> bool:
    return model.output_modalities is not None and {"text"} < model.output_modalities


def _null(_constant: str) -> None:
    """NaN and Infinity are no JSON; a price that is one of them is missing."""


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _exact(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent beyond all bounds
        return None


def _entries(answer: Json) -> list[dict[str, Json]]:
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list):
        raise ValueError("the model list has no `data`")
    return [entry for entry in data if isinstance(entry, dict)]


def _object(value: Json) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _tokens(value: Json) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return None
    return min(value, MAX_TOKENS)


def _strings(value: Json) -> frozenset[str] | None:
    return frozenset(item for item in value if isinstance(item, str)) if isinstance(value, list) else None
