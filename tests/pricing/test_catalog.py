"""The model list: fetched once, served stale, and never broken by one odd entry."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UpstreamTimeout, UpstreamUnavailable
from gateway.pricing.catalog import RETRY_SECONDS, Catalog, ModelIndex, parse_model, read_models

PRICING = {"prompt": "0.000001", "completion": "0.000002"}


def entry(model_id: str = "a/b", **changes: Any) -> dict[str, Any]:
    return {"id": model_id, "pricing": PRICING, "context_length": 1000, **changes}


def answer(*entries: Any) -> bytes:
    return json.dumps({"data": list(entries)}).encode()


class Upstream:
    """A model list that can be changed, held up and broken, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.calls = 0
        self.payload = answer(entry())
        self.error: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.now = 0.0

    async def fetch(self) -> bytes:
        self.calls += 1
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return self.payload

    def catalog(self, ttl_seconds: float = 300) -> Catalog:
        return Catalog(self.fetch, ttl_seconds=ttl_seconds, clock=lambda: self.now)


async def settled() -> None:
    """Wait until no refresh is under way."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


async def test_the_first_caller_gets_the_list() -> None:
    assert (await Upstream().catalog().models()).get("a/b") is not None


async def test_a_fresh_list_is_not_fetched_again() -> None:
    upstream = Upstream()
    catalog = upstream.catalog()
    await catalog.models()
    upstream.now = 299
    await catalog.models()
    assert upstream.calls == 1


async def test_concurrent_callers_share_one_fetch() -> None:
    upstream = Upstream()
    catalog = upstream.catalog()
    await asyncio.gather(*(catalog.models() for _ in range(50)))
    assert upstream.calls == 1


async def test_a_cancelled_caller_does_not_cancel_the_others() -> None:
    upstream = Upstream()
    upstream.open.clear()
    catalog = upstream.catalog()
    first, second = asyncio.create_task(catalog.models()), asyncio.create_task(catalog.models())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    upstream.open.set()
    assert len(await second) == 1


async def test_a_fetch_whose_callers_are_all_gone_still_fills_the_cache() -> None:
    upstream = Upstream()
    upstream.open.clear()
    catalog = upstream.catalog()
    caller = asyncio.create_task(catalog.models())
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    upstream.open.set()
    await settled()
    assert catalog.status().has_data


async def test_an_old_list_is_served_while_it_is_replaced() -> None:
    upstream = Upstream()
    catalog = upstream.catalog()
    await catalog.models()
    upstream.now, upstream.payload = 300, answer(entry("new/model"))
    upstream.open.clear()
    assert (await catalog.models()).get("a/b") is not None


async def test_the_background_refresh_replaces_the_list() -> None:
    upstream = Upstream()
    catalog = upstream.catalog()
    await catalog.models()
    upstream.now, upstream.payload = 300, answer(entry("new/model"))
    await catalog.models()
    await settled()
    assert (await catalog.models()).get("new/model") is not None


async def test_a_list_that_is_being_replaced_or_cannot_be_asks_the_upstream_of_nobody_else() -> None:
    """Who asks for it needs no key checked beforehand: a request makes no more round trips while the
    upstream's list is away.
    """
    upstream = Upstream()
    catalog = upstream.catalog()
    await catalog.models()
    upstream.now, upstream.error = 300.0, UpstreamTimeout()
    assert not catalog.is_fresh
    upstream.open.clear()
    await catalog.models()
    assert catalog.is_fresh
    upstream.open.set()
    await settled()
    assert catalog.is_fresh and upstream.calls == 2
    await catalog.models()
    assert upstream.calls == 2
    upstream.now += RETRY_SECONDS
    assert not catalog.is_fresh
    await catalog.models()
    await settled()
    assert upstream.calls == 3


async def test_only_one_background_refresh_runs() -> None:
    upstream = Upstream()
    catalog = upstream.catalog()
    await catalog.models()
    upstream.now = 300
    upstream.open.clear()
    for _ in range(20):
        await catalog.models()
    await asyncio.sleep(0)
    upstream.open.set()
    await settled()
    assert upstream.calls == 2


async def test_a_failing_upstream_leaves_the_old_list_in_use() -> None:
    upstream = Upstream()
    catalog = upstream.catalog()
    await catalog.models()
    upstream.now, upstream.error = 300, UpstreamTimeout()
    await catalog.models()
    await settled()
    assert len(await catalog.models()) == 1


async def test_a_failed_refresh_is_recorded() -> None:
    upstream = Upstream()
    catalog = upstream.catalog()
    await catalog.models()
    upstream.now, upstream.error = 300, UpstreamTimeout()
    await catalog.models()
    await settled()
    assert catalog.last_error is upstream.error


async def test_a_failed_refresh_is_not_repeated_at_once() -> None:
    upstream = Upstream()
    catalog = upstream.catalog()
    await catalog.models()
    upstream.now, upstream.error = 300, UpstreamTimeout()
    for _ in range(5):
        await catalog.models()
        await settled()
    assert upstream.calls == 2


@pytest.mark.parametrize(("ttl", "wait"), [(300.0, RETRY_SECONDS), (2.0, 2.0)])
async def test_a_failed_refresh_is_repeated_after_a_while(ttl: float, wait: float) -> None:
    upstream = Upstream()
    catalog = upstream.catalog(ttl)
    await catalog.models()
    upstream.now, upstream.error = ttl, UpstreamTimeout()
    await catalog.models()
    await settled()
    upstream.now += wait
    await catalog.models()
    await settled()
    assert upstream.calls == 3


async def test_a_success_clears_the_recorded_error() -> None:
    upstream = Upstream()
    upstream.error = UpstreamTimeout()
    catalog = upstream.catalog()
    with pytest.raises(UpstreamUnavailable):
        await catalog.models()
    upstream.error = None
    await catalog.models()
    assert catalog.last_error is None


@pytest.mark.parametrize(
    "error", [UpstreamTimeout(), OSError("reset"), TimeoutError(), ValueError("no JSON")]
)
async def test_without_any_list_a_failure_is_upstream_unavailable(error: Exception) -> None:
    upstream = Upstream()
    upstream.error = error
    with pytest.raises(UpstreamUnavailable, match="model list"):
        await upstream.catalog().models()


async def test_without_any_list_a_failure_is_retried_by_the_next_caller() -> None:
    upstream = Upstream()
    upstream.error = UpstreamTimeout()
    catalog = upstream.catalog()
    with pytest.raises(UpstreamUnavailable):
        await catalog.models()
    upstream.error = None
    assert len(await catalog.models()) == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"data": {}}',
        b'{"data": []}',
        b'{"data": [1, {}]}',
        b"\xff",
        b"[" * 100_000,
    ],
)
async def test_an_answer_that_is_no_model_list_counts_as_a_failure(payload: bytes) -> None:
    upstream = Upstream()
    upstream.payload = payload
    with pytest.raises(UpstreamUnavailable):
        await upstream.catalog().models()


async def test_a_forced_refresh_fetches_a_fresh_list_again() -> None:
    upstream = Upstream()
    catalog = upstream.catalog()
    await catalog.models()
    upstream.payload = answer(entry("new/model"))
    assert (await catalog.refresh()).get("new/model") is not None


async def test_a_forced_refresh_that_fails_says_so_and_keeps_the_list() -> None:
    upstream = Upstream()
    catalog = upstream.catalog()
    await catalog.models()
    upstream.error = UpstreamTimeout()
    with pytest.raises(UpstreamUnavailable):
        await catalog.refresh()
    assert catalog.status().has_data


async def test_closing_stops_a_refresh_under_way() -> None:
    upstream = Upstream()
    upstream.open.clear()
    catalog = upstream.catalog()
    caller = asyncio.create_task(catalog.models())
    await asyncio.sleep(0)
    await catalog.aclose()
    await asyncio.wait([caller])
    assert caller.cancelled()


async def test_closing_an_idle_catalog_does_nothing() -> None:
    catalog = Upstream().catalog()
    await catalog.aclose()
    assert not catalog.status().has_data


async def test_status_of_an_empty_cache() -> None:
    status = Upstream().catalog().status()
    assert (status.has_data, status.cache_age_seconds, status.is_valid, status.total_cached_models) == (
        False,
        None,
        False,
        0,
    )


async def test_status_of_a_fresh_list() -> None:
    upstream = Upstream()
    catalog = upstream.catalog()
    await catalog.models()
    upstream.now = 12.5
    status = catalog.status()
    assert (status.cache_age_seconds, status.ttl_seconds, status.is_valid, status.total_cached_models) == (
        12.5,
        300,
        True,
        1,
    )


async def test_status_of_an_old_list() -> None:
    upstream = Upstream()
    catalog = upstream.catalog()
    await catalog.models()
    upstream.now = 300
    assert not catalog.status().is_valid


def test_entries_are_kept_as_the_upstream_wrote_them() -> None:
    entries = [entry("z/z", odd=[None, 1.5, {"é": "\ud800"}]), entry("a/a")]
    assert read_models(answer(*entries)).raw == entries


def test_the_ready_made_answer_holds_the_same_entries() -> None:
    entries = [entry("z/z", odd=[None, 1.5, {"é": "\ud800", "big": 2**80}]), entry("a/a")]
    whole = json.loads(read_models(answer(*entries)).json)
    assert whole == {
        "data": entries,
        "total_count": len(entries),
        "links": {"next": None},
    }  # OpenRouter's own SDK insists on all three


def test_numbers_that_are_no_json_become_null() -> None:
    index = read_models(
        b'{"data": [{"id": "a/b", "x": NaN, "y": -Infinity, "z": 1e999, "w": 1e9999999999999999999}]}'
    )
    assert index.raw[0] == {"id": "a/b", "x": None, "y": None, "z": None, "w": None}


@pytest.mark.parametrize(
    "odd", [None, 1, "x", [], {}, {"id": 5}, {"id": ""}, {"id": None, "pricing": PRICING}]
)
def test_an_odd_entry_does_not_hide_its_neighbours(odd: object) -> None:
    assert read_models(answer(odd, entry())).get("a/b") is not None


def test_prices_are_read_from_numbers_without_passing_through_floats() -> None:
    index = read_models(
        b'{"data": [{"id": "a/b", "pricing": {"prompt": 0.1000000000000000055, "completion": "0"}}]}'
    )
    model = index.get("a/b")
    assert model is not None and model.price is not None
    assert model.price.base.prompt == Decimal("100000000.000000006")


def test_a_model_without_a_price_is_listed_all_the_same() -> None:
    model = parse_model(entry(pricing={"prompt": "-1", "completion": "-1"}))
    assert model is not None and model.price is None


def test_the_longest_known_context_counts() -> None:
    model = parse_model(entry(context_length=1000, top_provider={"context_length": 4000}))
    assert model is not None and model.context_length == 4000


def test_the_output_maximum_is_the_top_providers() -> None:
    model = parse_model(entry(top_provider={"max_completion_tokens": 50}))
    assert model is not None and model.max_output == 50


def test_the_output_maximum_is_else_the_context_length() -> None:
    model = parse_model(entry(top_provider={"max_completion_tokens": None}))
    assert model is not None and model.max_output == 1000


@pytest.mark.parametrize("length", [None, 0, -5, True, "1000", 1.5, []])
def test_an_invalid_length_is_unknown(length: object) -> None:
    model = parse_model(entry(context_length=length))
    assert model is not None and (model.context_length, model.max_output) == (None, None)


def test_only_the_output_limits_of_the_parameters_are_kept() -> None:
    model = parse_model(entry(supported_parameters=["tools", "max_tokens", 5]))
    assert model is not None and model.limit_fields == {"max_tokens"}


def test_a_model_that_takes_search_options_at_a_price_searches_by_itself() -> None:
    model = parse_model(
        entry(pricing={**PRICING, "web_search": "0.01"}, supported_parameters=["web_search_options"])
    )
    assert model is not None and model.searches


@pytest.mark.parametrize(
    ("model_id", "price", "is_router"),
    [("openrouter/auto", "-1", True), ("openrouter/auto", "0.1", False), ("openrouter/fusion", "-1", False)],
)
def test_the_auto_router_is_a_model_without_a_price(model_id: str, price: str, is_router: bool) -> None:
    model = parse_model(entry(model_id, pricing={"prompt": price, "completion": price}))
    assert model is not None and model.is_router is is_router


def test_markups_count_models_of_text_only() -> None:
    dear = {**PRICING, "image_token": "0.1"}
    picture = entry("a/picture", pricing=dear, architecture={"output_modalities": ["image"]})
    talker = entry(
        "a/talker",
        pricing={**PRICING, "input_cache_write": "0.000002"},
        architecture={"output_modalities": ["text"]},
    )
    assert read_models(answer(picture, talker)).markups.input == 2


INDEX = read_models(answer(entry("a/b"), entry("a/b:free"), entry("c/d:nitro")))


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("a/b", "a/b"),
        ("a/b:free", "a/b:free"),
        ("a/b:nitro", "a/b"),
        ("a/b:floor:online", "a/b"),
        ("a/b:free:exacto", "a/b:free"),
        ("a/b:nitro:free", "a/b:free"),
        ("c/d:nitro", "c/d:nitro"),
    ],
)
def test_names_resolve_to_the_entry_that_describes_them(name: str, model_id: str) -> None:
    model = INDEX.resolve(name)
    assert model is not None and model.id == model_id


@pytest.mark.parametrize(
    "name", ["x/y", "a/b:thinking", "a/b:slow", "a/b:", "c/d", "c/d:free", ":", "", ":nitro"]
)
def test_other_names_resolve_to_nothing(name: str) -> None:
    assert INDEX.resolve(name) is None


def test_more_suffixes_are_dropped_only_where_they_are_given() -> None:
    assert (INDEX.resolve("a/b:slow"), INDEX.resolve("a/b:slow", more_suffixes=frozenset({"slow"}))) == (
        None,
        INDEX.get("a/b"),
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet="aZ0.-é漢\ud800", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(alphabet="aZ_é", max_size=12), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from(
    ["id", "pricing", "context_length", "top_provider", "supported_parameters", "architecture"]
)


@given(entries=st.lists(st.dictionaries(names, json_values, max_size=6), max_size=4))
def test_no_entry_breaks_the_list(entries: list[dict[str, Any]]) -> None:
    index = read_models(answer(*entries, entry("sure/model")))
    assert isinstance(index, ModelIndex) and index.get("sure/model") is not None
