"""Tools that the upstream runs, routers, price caps and receipts: what bounds them, and what has no bound."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import orjson
import pytest

from common.errors import BadRequest, UnboundedCost
from gateway.pricing.catalog import read_models
from gateway.pricing.readers.tools import MAX_TOOL_STEPS
from gateway.pricing.upper_bound import BoundPolicy, bound_request
from tests.support.bounds import (
    CHAT,
    INDEX,
    POLICY,
    amounts,
    bound,
    chat,
    entry,
    image,
    refusal,
    sent,
    with_parts,
)

CONTEXT = 100_000 * 1_000  # of plain/model, in nano-dollars
SEARCH = 20_000_000
OUTPUT = 2_000


def search(**parameters: Any) -> dict[str, Any]:
    return {"type": "openrouter:web_search", "parameters": parameters}


CLOCK = {"type": "openrouter:datetime"}


# Server tools


def test_a_search_tool_is_held_for_every_turn_and_every_search() -> None:
    upper_bound = bound(chat(tools=[search(max_uses=3)], max_tokens=100))
    assert amounts(upper_bound) == (5 * CONTEXT + 3 * SEARCH, 5 * OUTPUT)


def test_a_search_tool_goes_out_with_an_engine_and_an_end_of_the_loop() -> None:
    sent = bound(chat(tools=[search(max_uses=3)])).apply(1)
    assert sent["tools"] == [search(max_uses=3, engine="exa")]
    assert sent["stop_server_tools_when"] == [{"type": "step_count_is", "step_count": 3}]


@pytest.mark.parametrize("tool", [search(), {"type": "openrouter:web_search", "max_uses": 3}])
def test_a_search_tool_that_does_not_say_how_often_may_be_used_once(tool: dict[str, Any]) -> None:
    upper_bound = bound(chat(tools=[tool], max_tokens=100))
    assert amounts(upper_bound) == (3 * CONTEXT + SEARCH, 3 * OUTPUT)
    assert upper_bound.apply(1)["tools"] == [{**tool, "parameters": {"max_uses": 1, "engine": "exa"}}]


def test_more_results_make_every_search_dearer() -> None:
    upper_bound = bound(chat(tools=[search(max_uses=2, max_results=25, engine="parallel")]))
    assert upper_bound.fixed_nanos == 4 * CONTEXT + 2 * 100_000_000


def test_a_clock_costs_its_turns() -> None:
    upper_bound = bound(chat(tools=[CLOCK]))
    assert amounts(upper_bound) == (3 * CONTEXT, 3 * OUTPUT)


def test_function_tools_stay_beside_server_tools() -> None:
    function = {"type": "function", "function": {"name": "f"}}
    assert bound(chat(tools=[function, CLOCK])).apply(1)["tools"] == [function, CLOCK]


@pytest.mark.parametrize(
    "fields",
    [{"max_tool_calls": 2}, {"stop_server_tools_when": [{"type": "step_count_is", "step_count": 2}]}],
)
def test_the_clients_own_end_of_the_loop_counts_where_it_is_earlier(fields: dict[str, Any]) -> None:
    upper_bound = bound(chat(tools=[search(max_uses=9)], **fields))
    assert upper_bound.fixed_nanos == 4 * CONTEXT + 9 * SEARCH
    assert sent(upper_bound)["stop_server_tools_when"][-1] == {"type": "step_count_is", "step_count": 2}


def test_more_steps_than_were_asked_for_are_not_sent() -> None:
    sent = bound(chat(tools=[search(max_uses=2)], max_tool_calls=30)).apply(1)
    assert sent["max_tool_calls"] == 2


def test_many_tools_end_at_the_documented_maximum() -> None:
    upper_bound = bound(chat(tools=[search(max_uses=30)] * 4))
    assert upper_bound.output_nanos == (MAX_TOOL_STEPS + 2) * OUTPUT
    assert upper_bound.fixed_nanos == (MAX_TOOL_STEPS + 2) * CONTEXT + 120 * SEARCH


def test_a_cost_limit_is_held_with_the_turn_that_exceeds_it_and_the_last_one() -> None:
    stop = [{"type": "max_cost", "max_cost_in_dollars": 0.25}]
    upper_bound = bound(chat(tools=[search(max_uses=9)], stop_server_tools_when=stop, max_tokens=100))
    assert amounts(upper_bound) == (250_000_000 + 2 * CONTEXT + 9 * SEARCH, 2 * OUTPUT)
    assert sent(upper_bound)["stop_server_tools_when"][0] == stop[0]


def test_a_cost_limit_above_what_the_steps_can_cost_changes_nothing() -> None:
    stop = [{"type": "max_cost", "max_cost_in_dollars": "1000"}]
    assert bound(chat(tools=[CLOCK], stop_server_tools_when=stop)).fixed_nanos == 3 * CONTEXT


def test_conditions_that_only_stop_earlier_stay() -> None:
    stop = [{"type": "has_tool_call", "tool_name": "f"}]
    assert (
        sent(bound(chat(tools=[CLOCK], stop_server_tools_when=stop)))["stop_server_tools_when"][0] == stop[0]
    )


@pytest.mark.parametrize(
    "tool",
    [
        search(max_uses=1, engine="native"),
        search(max_uses=1, engine="firecrawl"),
        {"type": "openrouter:web_fetch", "parameters": {"max_uses": 1}},
        {"type": "openrouter:image_generation"},
        {"type": "openrouter:fusion"},
        {"type": "openrouter:advisor"},
        {"type": "openrouter:subagent"},
        {"type": "openrouter:shell"},
        {"type": "openrouter:tool_search"},
        {"type": "web_search", "max_uses": 1},
        {"type": "web_search_20250305", "max_uses": 1},
        {"type": []},
    ],
)
def test_server_tools_without_a_documented_bound_are_refused(tool: dict[str, Any]) -> None:
    error = refusal(chat(tools=[tool]))
    assert isinstance(error, UnboundedCost) and (error.status, error.param) == (400, "tools")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [search(max_uses=0)]}, "tools.max_uses"),
        ({"tools": [search(max_uses=31)]}, "tools.max_uses"),
        ({"tools": [search(max_uses="3")]}, "tools.max_uses"),
        ({"tools": [search(max_uses=3, max_results=26)]}, "tools.max_results"),
        ({"tools": [{"type": "openrouter:web_search", "parameters": []}]}, "tools"),
        ({"tools": [CLOCK], "max_tool_calls": 0}, "max_tool_calls"),
        ({"tools": [CLOCK], "stop_server_tools_when": {}}, "stop_server_tools_when"),
        ({"tools": [CLOCK], "stop_server_tools_when": [1]}, "stop_server_tools_when"),
        ({"tools": [CLOCK], "stop_server_tools_when": [{"type": "max_cost"}]}, "stop_server_tools_when"),
        (
            {"tools": [CLOCK], "stop_server_tools_when": [{"type": "step_count_is", "step_count": 0}]},
            "stop_server_tools_when.step_count",
        ),
    ],
)
def test_wrong_settings_of_tools_are_named(fields: dict[str, Any], param: str) -> None:
    error = refusal(chat(**fields))
    assert isinstance(error, BadRequest) and (error.code, error.param) == ("invalid_request", param)


@pytest.mark.parametrize("endpoint", ["completions", "embeddings"])
def test_server_tools_do_not_belong_to_other_endpoints(endpoint: str) -> None:
    body = (
        {"model": "embed/model", "input": "Hi"}
        if endpoint == "embeddings"
        else {"model": "plain/model", "prompt": "Hi"}
    )
    assert refusal({**body, "tools": [CLOCK]}, endpoint).param == "tools"


def test_a_loop_on_a_model_without_a_known_context_is_refused() -> None:
    assert isinstance(refusal(chat("vast/model", tools=[CLOCK])), UnboundedCost)


def test_a_model_of_a_price_that_is_not_understood_runs_no_tools() -> None:
    assert isinstance(refusal(chat("video/model", tools=[CLOCK])), UnboundedCost)


# Routers

CAPS = {"prompt": 1, "completion": 2}


def routed(body_caps: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return chat("openrouter/auto", provider={"max_price": CAPS if body_caps is None else body_caps}, **fields)


def test_a_router_is_held_at_the_clients_caps_and_the_markups_of_the_list() -> None:
    body = routed(max_tokens=10)
    upper_bound = bound(body)
    # tiered/model charges nine times its listed price for long prompts, thinking/model five times for
    # reasoning.
    assert upper_bound.fixed_nanos == (len(json.dumps(body)) + 256 + 16) * 9_000
    assert upper_bound.output_nanos == 5 * 2_000


def test_a_router_goes_out_with_exactly_those_caps() -> None:
    sent = bound(routed(max_tokens=10)).apply(10)
    caps = {"prompt": "1", "completion": "2", "request": "0"}
    assert sent["provider"] == {"max_price": caps, "require_parameters": True}
    assert sent["max_tokens"] == 10


def test_a_router_is_kept_off_models_that_search_by_themselves_or_put_out_media() -> None:
    own = {"id": "auto-router", "enabled": False, "allowed_models": ["a/*"], "excluded_models": ["b/*"]}
    sent = bound(routed(plugins=[{"id": "moderation"}, own])).apply(1)
    allowed = {
        "id": "auto-router",
        "enabled": True,
        "allowed_models": ["a/*"],
        "excluded_models": ["b/*", "painter/model", "speaker/model", "seeker/model"],
    }
    assert sent["plugins"] == [{"id": "moderation"}, allowed]


def test_a_routers_plugin_without_the_router_is_refused() -> None:
    assert refusal(chat(plugins=[{"id": "auto-router"}])).param == "plugins"


def test_a_search_on_a_router_is_held_for_its_context() -> None:
    upper_bound = bound(routed(plugins=[{"id": "web"}]))
    assert upper_bound.fixed_nanos == 200_000 * 9_000 + SEARCH
    assert [plugin["id"] for plugin in sent(upper_bound)["plugins"]] == ["web", "auto-router"]


def test_a_router_beside_models_is_the_dearer_of_both() -> None:
    body = routed(models=["dear/model"])
    assert bound(body).output_nanos == 50_000


def test_images_on_a_router_need_their_cap() -> None:
    body = with_parts(image(), model="openrouter/auto", provider={"max_price": CAPS})
    assert refusal(body).param == "provider.max_price"
    body["provider"] = {"max_price": {**CAPS, "image": "0.5"}}
    assert sent(bound(body))["provider"]["max_price"]["image"] == "0.5"


@pytest.mark.parametrize("caps", [{}, {"prompt": 1}, {"completion": 1}, {"request": 1}])
def test_a_router_without_its_caps_is_refused(caps: dict[str, Any]) -> None:
    error = refusal(routed(caps))
    assert isinstance(error, UnboundedCost) and error.param in ("model", "provider.max_price")


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["image"]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]},
    ],
)
def test_media_on_a_router_are_refused(fields: dict[str, Any]) -> None:
    assert isinstance(refusal(routed(**fields)), UnboundedCost)


def test_other_routers_stay_refused_whatever_their_caps() -> None:
    assert isinstance(refusal(chat("router/auto", provider={"max_price": CAPS})), UnboundedCost)


def test_a_router_does_not_embed() -> None:
    body = {"model": "openrouter/auto", "input": "Hi", "provider": {"max_price": CAPS}}
    assert isinstance(refusal(body, "embeddings"), UnboundedCost)


# Price caps and receipts


def test_caps_of_media_go_out_where_they_are_in_the_bound() -> None:
    body = with_parts(image(), {"type": "input_audio", "input_audio": {"data": ""}}, model="eyed/model")
    caps = sent(bound(body))["provider"]["max_price"]
    assert (caps["image"], caps["audio"]) == ("0.001", "0.00003")


def test_a_clients_lower_cap_of_audio_stays() -> None:
    body = with_parts({"type": "input_audio", "input_audio": {"data": ""}}, model="eyed/model")
    body["provider"] = {"max_price": {"audio": "0.00001"}}
    upper_bound = bound(body)
    assert upper_bound.max_price["audio"] == "0.00001" and upper_bound.client_caps_price


@pytest.mark.parametrize(
    ("caps", "excludes"),
    [
        ({}, False),
        ({"prompt": 1.01, "completion": 5}, False),
        ({"prompt": 1, "completion": 2}, True),  # nobody dearer than this, they say themselves
        ({"prompt": 0.99}, True),
        ({"completion": "1.99"}, True),
        ({"prompt": 5, "completion": 5, "request": 0}, True),
        ({"image": 0}, True),  # a cap that we would not have sent
    ],
)
def test_a_bound_knows_whether_the_clients_own_caps_exclude_a_model(
    caps: dict[str, Any], excludes: bool
) -> None:
    assert bound(chat(provider={"max_price": caps})).client_caps_price is excludes


def test_a_cap_below_one_of_several_models_excludes() -> None:
    assert bound(chat(models=["dear/model"], provider={"max_price": {"prompt": 1}})).client_caps_price


def test_a_routers_caps_are_the_clients_own() -> None:
    assert bound(routed()).client_caps_price


def test_the_price_basis_is_plain_text() -> None:
    basis = bound(chat("fixed/model")).price_basis
    assert basis == {
        "fixed_nanos": "500000000",
        "output_nanos": "0",
        "max_price": {"prompt": "0", "completion": "0", "request": "0.5"},
    }


def test_a_quote_takes_listed_prices() -> None:
    upper_bound = bound(chat("cached/model"))
    assert upper_bound.typical_nanos(100) == upper_bound.prompt_estimate * 1_000 + 100 * 2_000


def test_a_quote_counts_choices_and_the_fee_of_a_request() -> None:
    assert bound(chat(n=3)).typical_nanos(10) - bound(chat(n=3)).typical_nanos(0) == 3 * 10 * 2_000
    assert bound(chat("fixed/model")).typical_nanos(1_000) == Decimal(500_000_000)


def test_a_quote_never_exceeds_the_bound() -> None:
    for model in ("plain/model", "cached/model", "thinking/model", "vision/model", "painter/model"):
        upper_bound = bound(chat(model, max_tokens=50))
        assert upper_bound.typical_nanos(50) <= upper_bound.fixed_nanos + 50 * upper_bound.output_nanos


# Images that a chat may bring


def test_a_chat_that_may_bring_an_image_is_held_for_a_whole_one() -> None:
    with_image, text = (
        bound(chat("painter/model", max_tokens=16)),
        bound(chat("painter/model", max_tokens=16, modalities=["text"])),
    )
    assert with_image.fixed_nanos - text.fixed_nanos > 20_480 * 30_000 - 100_000


def test_every_choice_may_bring_an_image() -> None:
    one, three = bound(chat("painter/model")), bound(chat("painter/model", n=3))
    assert three.fixed_nanos - one.fixed_nanos == 2 * 20_480 * 30_000 + len(', "n": 3') * 1_000


def test_a_larger_image_is_held_where_the_client_configures_it() -> None:
    small, large = (
        bound(chat("painter/model")),
        bound(chat("painter/model", image_config={"image_size": "4K"})),
    )
    assert large.fixed_nanos > 3 * small.fixed_nanos


def test_a_model_of_unknown_output_is_held_for_an_image_that_is_asked_for() -> None:
    index = read_models(
        json.dumps(
            {"data": [entry("new/model", pricing={"image_output": "0.00003"}, architecture={})]}
        ).encode()
    )
    assert bound(chat("new/model", modalities=["image"]), index=index).fixed_nanos > 20_480 * 30_000


def test_a_model_that_only_makes_images_is_not_talked_into_text() -> None:
    assert bound(chat("canvas/model", modalities=["text"])).output_nanos == 40_000


def test_a_free_model_stays_off_whatever_its_tools_cost() -> None:
    assert refusal(chat("free/model", tools=[search(max_uses=1)]), CHAT).code == "free_models_disabled"
    assert (
        bound(
            chat("free/model", tools=[search(max_uses=1)]), policy=BoundPolicy(4096, free_models=True)
        ).fixed_nanos
        == SEARCH
    )


NUMBERS = {
    "1e20": "100000000000000000000",
    "1e15": "1000000000000000.0",
    "1e-6": "0.000001",
    "123456789012345678901": "1.2345678901234568e+20",
}


@pytest.mark.parametrize("written", NUMBERS)
@pytest.mark.parametrize("endpoint", ["chat/completions", "responses", "messages"])
def test_numbers_count_at_the_longest_form_they_may_be_rewritten_in(endpoint: str, written: str) -> None:
    """JSON is read and written on its way: 1e20 is 4 bytes here, and 21 digits, each a token, in a prompt of
    JavaScript's making.
    """
    schema = f'{{"type":"object","enum":[{",".join([written] * 2_000)}]}}'
    tool = {
        "chat/completions": f'{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}',
        "responses": f'{{"type":"function","name":"f","parameters":{schema}}}',
        "messages": f'{{"name":"f","input_schema":{schema}}}',
    }[endpoint]
    content = '"input":"Hi"' if endpoint == "responses" else '"messages":[{"role":"user","content":"Hi"}]'
    limit = "max_output_tokens" if endpoint == "responses" else "max_tokens"
    raw = f'{{"model":"plain/model",{content},"{limit}":1,"tools":[{tool}]}}'.encode()
    upper_bound = bound_request(endpoint, orjson.loads(raw), len(raw), INDEX, POLICY)
    assert upper_bound.fixed_nanos >= 1_000 * len(raw.replace(written.encode(), NUMBERS[written].encode()))
