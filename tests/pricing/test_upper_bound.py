"""Bounds: never below what a request can cost, and a clear refusal where nothing is known."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadRequest, Forbidden, ModelNotFound, UnboundedCost
from gateway.pricing.candidates import IMAGE_TOKENS
from gateway.pricing.catalog import read_models
from gateway.pricing.upper_bound import BoundPolicy, bound_request
from tests.support.bounds import (
    BOTH_LIMITS,
    CHAT,
    INDEX,
    MODELS,
    NANOS,
    PDF,
    PDF_PARSER,
    POLICY,
    bound,
    chat,
    image,
    refusal,
    sent,
    with_parts,
)

# Prompt


def test_every_byte_of_the_body_counts_as_a_prompt_token() -> None:
    short, long = bound(chat(user="")), bound(chat(user="x" * 1_000))
    assert long.fixed_nanos - short.fixed_nanos == 1_000 * 1_000


def test_the_prompt_is_at_most_the_context_length() -> None:
    body = chat(messages=[{"role": "user", "content": "x" * 300_000}])
    assert bound(body).fixed_nanos == 100_000 * 1_000


def test_a_cache_write_price_counts_for_the_whole_prompt() -> None:
    body = chat(messages=[{"role": "user", "content": "x" * 300_000}])
    assert bound({**body, "model": "cached/model"}).fixed_nanos == 100_000 * 2_000


def test_a_dearer_tier_counts_once_the_prompt_may_reach_it() -> None:
    body = chat("tiered/model", messages=[{"role": "user", "content": "x" * 300_000}])
    assert bound(body).fixed_nanos == 100_000 * 9_000


def test_a_dearer_tier_does_not_count_for_a_short_prompt() -> None:
    assert bound(chat("tiered/model")).fixed_nanos == bound(chat("vision/model")).fixed_nanos


def test_more_messages_cost_more_than_their_bytes() -> None:
    one, two = chat(), chat(messages=[{"role": "user", "content": "Hi"}] * 2)
    extra = (len(json.dumps(two)) - len(json.dumps(one))) * 1_000
    assert bound(two).fixed_nanos - bound(one).fixed_nanos > extra


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"functions": [{"name": "f"}]},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_tools_and_schemas_get_an_allowance_beyond_their_bytes(fields: dict[str, Any]) -> None:
    extra = (len(json.dumps(chat(**fields))) - len(json.dumps(chat()))) * 1_000
    assert bound(chat(**fields)).fixed_nanos - bound(chat()).fixed_nanos > extra


def test_the_estimate_is_a_quarter_of_the_bytes() -> None:
    body = chat(messages=[{"role": "user", "content": "x" * 4_000}])
    assert bound(body).prompt_estimate == len(json.dumps(body)) // 4


def test_a_fixed_price_is_bounded_exactly() -> None:
    upper_bound = bound(chat("fixed/model"))
    assert (upper_bound.fixed_nanos, upper_bound.output_nanos) == (Decimal(500_000_000), Decimal(0))


# Media


def test_a_data_url_counts_as_one_image_instead_of_its_bytes() -> None:
    small, large = image("data:image/png;base64,AA"), image("data:image/png;base64," + "A" * 50_000)
    assert bound(with_parts(small)).fixed_nanos == bound(with_parts(large)).fixed_nanos


def test_a_long_data_url_does_not_enter_the_estimate() -> None:
    assert bound(with_parts(image("data:image/png;base64," + "A" * 500_000))).prompt_estimate < 1_100


def test_every_image_is_held_at_the_largest_documented_token_count() -> None:
    assert bound(with_parts(image())).fixed_nanos > IMAGE_TOKENS * 1_000


def test_images_are_charged_by_image_and_by_token() -> None:
    body = with_parts(image(), image(), image(), model="vision/model")
    assert bound(body).fixed_nanos == 3 * 1_000_000 + 100_000 * 4_000


def test_a_data_url_that_is_no_image_counts_in_bytes() -> None:
    text = {"type": "text", "text": "data:image/png;base64," + "A" * 50_000}
    assert bound(with_parts(text)).fixed_nanos > 50_000 * 1_000


def test_images_of_an_earlier_answer_count() -> None:
    message = {"role": "assistant", "content": "Here.", "images": [image()]}
    assert bound(chat(messages=[message])).fixed_nanos > IMAGE_TOKENS * 1_000


def audio(data: str = "AAAA") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def test_audio_may_fill_the_context_at_the_price_of_audio() -> None:
    assert bound(with_parts(audio(), model="ear/model")).fixed_nanos == 100_000 * 30_000


def test_audio_of_an_earlier_answer_counts() -> None:
    message = {"role": "assistant", "audio": {"id": "audio_1"}}
    assert bound(chat("ear/model", messages=[message])).fixed_nanos == 100_000 * 30_000


@pytest.mark.parametrize(
    "part", [audio("A" * 400_000), {"type": "file", "file": {"file_data": "A" * 400_000}}]
)
def test_the_bytes_of_audio_and_files_do_not_enter_the_estimate(part: dict[str, Any]) -> None:
    assert bound(with_parts(part, model="ear/model", plugins=[PDF_PARSER])).prompt_estimate < 1_100


def test_audio_without_a_price_is_refused() -> None:
    error = refusal(with_parts(audio()))
    assert isinstance(error, UnboundedCost) and error.param == "messages"


@pytest.mark.parametrize("kind", ["video_url", "input_video", "document", "tool_result", ""])
def test_content_without_a_known_price_is_refused(kind: str) -> None:
    error = refusal(with_parts({"type": kind}))
    assert isinstance(error, UnboundedCost) and error.param == "messages"


def test_a_file_makes_the_prompt_as_long_as_the_context() -> None:
    assert bound(with_parts(PDF, plugins=[PDF_PARSER])).fixed_nanos == 100_000 * 1_000


def test_an_annotation_of_a_parsed_file_counts_as_a_file() -> None:
    message = {"role": "assistant", "content": "", "annotations": [{"type": "file", "file": {}}]}
    assert bound(chat(messages=[message], plugins=[PDF_PARSER])).fixed_nanos == 100_000 * 1_000


def test_a_citation_does_not_count_as_a_file() -> None:
    message = {"role": "assistant", "content": "", "annotations": [{"type": "url_citation"}]}
    assert bound(chat(messages=[message])).fixed_nanos < 1_000 * 1_000


@pytest.mark.parametrize(
    "plugins", [[], [{"id": "file-parser"}], [{"id": "file-parser", "pdf": {"engine": "mistral-ocr"}}]]
)
def test_a_file_whose_parser_may_charge_by_the_page_is_refused(plugins: list[Any]) -> None:
    error = refusal(with_parts(PDF, plugins=plugins))
    assert isinstance(error, UnboundedCost) and error.param == "plugins"


def test_a_price_that_is_not_understood_refuses_media() -> None:
    assert isinstance(refusal(with_parts(image(), model="video/model")), UnboundedCost)


def test_a_price_that_is_not_understood_leaves_text_alone() -> None:
    assert bound(chat("video/model")).fixed_nanos == bound(chat("plain/model")).fixed_nanos


# Output


def test_without_a_limit_the_default_applies() -> None:
    upper_bound = bound(chat())
    assert (upper_bound.min_output, upper_bound.max_output) == (16, 4096)


def test_without_a_limit_the_models_maximum_applies_when_lower() -> None:
    assert bound(chat("dear/model")).max_output == 2_000


def test_a_clients_limit_is_the_only_one() -> None:
    upper_bound = bound(chat(max_tokens=500))
    assert (upper_bound.min_output, upper_bound.max_output) == (500, 500)


def test_a_clients_limit_is_capped_at_the_models_maximum() -> None:
    upper_bound = bound(chat(max_tokens=10**30))
    assert (upper_bound.min_output, upper_bound.max_output) == (8_000, 8_000)


def test_the_larger_of_two_limits_is_held() -> None:
    upper_bound = bound(chat(max_tokens=100, max_completion_tokens=300))
    assert (upper_bound.min_output, upper_bound.max_output) == (300, 300)


def test_both_limits_go_out_as_the_client_set_them() -> None:
    sent = bound(chat(max_tokens=100, max_completion_tokens=300)).apply(300)
    assert (sent["max_tokens"], sent["max_completion_tokens"]) == (100, 300)


def test_limits_above_the_grant_are_clamped() -> None:
    sent = bound(chat(max_tokens=9_000, max_completion_tokens=300)).apply(8_000)
    assert (sent["max_tokens"], sent["max_completion_tokens"]) == (8_000, 300)


def test_a_granted_output_goes_out_as_max_tokens() -> None:
    assert bound(chat()).apply(77)["max_tokens"] == 77


def test_a_granted_output_goes_out_in_the_field_that_the_model_lists() -> None:
    sent = bound(chat("modern/model")).apply(77)
    assert sent["max_completion_tokens"] == 77 and "max_tokens" not in sent


def test_a_limit_in_a_field_that_the_model_does_not_list_goes_out_in_both() -> None:
    sent = bound(chat("modern/model", max_tokens=50)).apply(50)
    assert (sent["max_tokens"], sent["max_completion_tokens"]) == (50, 50)


def test_models_that_list_different_limits_get_one_each() -> None:
    sent = bound(chat(models=["modern/model"], max_tokens=50)).apply(50)
    assert (sent["max_tokens"], sent["max_completion_tokens"]) == (50, 50)


def test_models_that_share_a_limit_get_only_that() -> None:
    index = read_models(json.dumps({"data": [*MODELS, BOTH_LIMITS]}).encode())
    sent = bound(chat("both/model", models=["modern/model"]), index=index).apply(50)
    assert sent["max_completion_tokens"] == 50 and "max_tokens" not in sent


def test_a_model_that_lists_both_limits_gets_max_tokens() -> None:
    index = read_models(json.dumps({"data": [BOTH_LIMITS]}).encode())
    sent = bound(chat("both/model"), index=index).apply(50)
    assert sent["max_tokens"] == 50 and "max_completion_tokens" not in sent


def test_a_model_without_limits_is_held_at_its_maximum() -> None:
    upper_bound = bound(chat("loose/model", max_tokens=10))
    assert (upper_bound.min_output, upper_bound.max_output) == (8_000, 8_000)


def test_nothing_is_set_for_a_model_without_limits() -> None:
    assert set(bound(chat("loose/model")).apply(8_000)) == {"provider"}


def test_a_model_without_limits_or_a_maximum_is_refused() -> None:
    error = refusal(chat("boundless/model", max_tokens=10))
    assert isinstance(error, UnboundedCost) and error.param == "model"


def test_a_model_with_limits_and_no_known_maximum_takes_the_default() -> None:
    assert bound(chat("vast/model")).max_output == 4096


def test_a_fallback_without_limits_sets_the_bound_of_all() -> None:
    upper_bound = bound(chat(models=["loose/model"], max_tokens=10))
    assert (upper_bound.min_output, upper_bound.max_output, upper_bound.apply(8_000)["max_tokens"]) == (
        8_000,
        8_000,
        10,
    )


def test_several_choices_multiply_the_output() -> None:
    assert bound(chat(n=4)).output_nanos == 4 * bound(chat()).output_nanos


def test_reasoning_makes_output_dearer() -> None:
    assert bound(chat("thinking/model")).output_nanos == 10_000


@pytest.mark.parametrize(("model", "nanos"), [("painter/model", 30_000), ("speaker/model", 80_000)])
def test_a_model_that_can_put_out_media_is_held_at_their_price(model: str, nanos: int) -> None:
    assert bound(chat(model)).output_nanos == nanos


def test_asking_for_text_only_is_held_at_the_price_of_text() -> None:
    assert bound(chat("painter/model", modalities=["text"])).output_nanos == 2_000


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_asking_for_media_without_a_price_is_refused(modality: str) -> None:
    error = refusal(chat(modalities=["text", modality]))
    assert isinstance(error, UnboundedCost) and error.param == "modalities"


def test_a_model_of_unpriced_media_is_refused_without_asking() -> None:
    assert isinstance(refusal(chat("artist/model")), UnboundedCost)


# Models


def test_all_models_are_reported_as_asked() -> None:
    upper_bound = bound(
        chat(models=["dear/model", "plain/model:floor", "plain/model"], fallbacks=[{"model": "cached/model"}])
    )
    assert upper_bound.models == ("plain/model", "dear/model", "plain/model:floor", "cached/model")


def test_models_alone_are_enough() -> None:
    assert bound(chat(None, models=["plain/model"])).models == ("plain/model",)


def test_the_dearest_model_counts() -> None:
    upper_bound = bound(chat(models=["dear/model"]))
    assert upper_bound.output_nanos == 50_000 and upper_bound.fixed_nanos > bound(chat()).fixed_nanos * 9


def test_with_fallbacks_the_default_fits_all_of_them() -> None:
    assert bound(chat(models=["dear/model"])).max_output == 2_000


@pytest.mark.parametrize("name", ["plain/model:nitro", "plain/model:floor", "plain/model:exacto:nitro"])
def test_routing_suffixes_are_priced_like_the_model(name: str) -> None:
    assert bound(chat(name)).output_nanos == bound(chat()).output_nanos


def test_nitro_is_kept_off_priority_endpoints() -> None:
    assert bound(chat("plain/model:nitro", service_tier="flex")).apply(1)["service_tier"] == "default"


def test_scenarios_are_priced_like_the_model_in_the_sandbox_only() -> None:
    sandbox = BoundPolicy(4096, free_models=False, any_suffix=frozenset({"slow"}))
    assert bound(chat("plain/model:slow"), policy=sandbox).max_output == 4096
    assert isinstance(refusal(chat("plain/model:slow")), ModelNotFound)


@pytest.mark.parametrize(
    "name", ["no/model", "plain/model:thinking", "dear/model:free", "plain/model:", "\ud800"]
)
def test_unknown_models_are_not_found(name: str) -> None:
    error = refusal(chat(name))
    assert isinstance(error, ModelNotFound) and error.param == "model"
    orjson.dumps(error.body("x"))


@pytest.mark.parametrize("name", ["router/auto", "router/auto:nitro", "plain/model:batch"])
def test_models_without_a_fixed_price_are_refused(name: str) -> None:
    error = refusal(chat(name))
    assert isinstance(error, UnboundedCost) and error.param == "model"


def test_a_router_among_the_fallbacks_is_refused() -> None:
    assert isinstance(refusal(chat(models=["router/auto"])), UnboundedCost)


@pytest.mark.parametrize(
    "name", ["free/model", "plain/model:free", "plain/model:free:nitro", "free/model:online"]
)
def test_free_models_are_refused_while_they_are_off(name: str) -> None:
    error = refusal(chat(name))
    assert isinstance(error, Forbidden) and error.param == "model"


def test_a_free_fallback_is_refused_while_they_are_off() -> None:
    assert isinstance(refusal(chat(models=["free/model"])), Forbidden)


def test_free_models_cost_nothing_where_they_are_on() -> None:
    upper_bound = bound(chat("free/model"), policy=BoundPolicy(4096, free_models=True))
    assert upper_bound.fixed_nanos == upper_bound.output_nanos == 0


# What has no bound


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"preset": "mine"}, "preset"),
        ({"model": "@preset/mine"}, "model"),
        ({"model": "plain/model@preset/mine"}, "model"),
        ({"models": ["@preset/mine"]}, "models"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"x_search_filter": {}}, "x_search_filter"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"service_tier": "fast"}, "service_tier"),
        ({"service_tier": "scale"}, "service_tier"),
        ({"service_tier": "new"}, "service_tier"),
        ({"service_tier": []}, "service_tier"),
        ({"speed": "fast"}, "speed"),
        ({"provider": {"order": ["openai/fast"]}}, "provider.order"),
        ({"provider": {"only": ["google-vertex/Priority"]}}, "provider.only"),
        ({"tools": [{}]}, "tools"),
        ({"modalities": ["video"]}, "modalities"),
        ({"plugins": [{"id": "fusion"}]}, "plugins"),
        ({"plugins": [{"id": []}]}, "plugins"),
        ({"plugins": [{}]}, "plugins"),
        ({"plugins": [{"id": "web", "engine": "native"}]}, "plugins"),
        ({"plugins": [{"id": "web", "engine": "firecrawl"}]}, "plugins"),
        ({"plugins": [{"id": "web", "x_search": {}}]}, "plugins"),
    ],
)
def test_what_has_no_bound_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refusal(chat(**fields) if "model" not in fields else {**chat(), **fields})
    assert isinstance(error, UnboundedCost) and error.param == param and error.status == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"service_tier": None},
        {"service_tier": "default"},
        {"service_tier": "flex"},
        {"speed": "standard"},
        {"provider": {"order": ["openai/flex", "deepinfra/turbo"], "sort": "price"}},
        {"plugins": [{"id": "response-healing"}, {"id": "context-compression"}, {"id": "moderation"}]},
        {"plugins": [{"id": "fusion", "enabled": False}]},
        {"plugins": [PDF_PARSER]},
        {"tools": [{"type": "function", "function": {}}]},
        {"temperature": "hot", "metadata": [], "whatever": {"deep": [1]}},
    ],
)
def test_what_costs_nothing_more_passes(fields: dict[str, Any]) -> None:
    assert bound(chat(**fields)).max_output == 4096


def test_an_automatic_tier_is_pinned_to_the_default_one() -> None:
    assert bound(chat(service_tier="auto")).apply(1)["service_tier"] == "default"


def test_fields_that_need_no_change_are_not_set() -> None:
    assert set(bound(chat(plugins=[{"id": "moderation"}])).apply(1)) == {"provider", "max_tokens"}


# Web search


def test_a_search_makes_the_prompt_as_long_as_the_context_and_adds_its_fee() -> None:
    assert bound(chat(plugins=[{"id": "web"}])).fixed_nanos == 100_000 * 1_000 + 20_000_000


def test_a_search_without_an_engine_gets_one_that_searches_once() -> None:
    sent = bound(chat(plugins=[{"id": "web", "max_results": 3}])).apply(1)
    assert sent["plugins"] == [{"id": "web", "max_results": 3, "engine": "exa"}]


def test_a_named_engine_with_a_known_price_stays() -> None:
    assert (
        sent(bound(chat(plugins=[{"id": "web", "engine": "parallel"}])))["plugins"][0]["engine"] == "parallel"
    )


def test_other_plugins_stay_beside_a_search() -> None:
    sent = bound(chat(plugins=[{"id": "moderation"}, {"id": "web"}])).apply(1)
    assert sent["plugins"] == [{"id": "moderation"}, {"id": "web", "engine": "exa"}]


def test_the_online_suffix_is_a_search() -> None:
    online, plugin = bound(chat("plain/model:online")), bound(chat(plugins=[{"id": "web"}]))
    assert (online.fixed_nanos, online.apply(1)) == (plugin.fixed_nanos, plugin.apply(1))


def test_the_online_suffix_does_not_search_twice() -> None:
    assert len(sent(bound(chat("plain/model:online", plugins=[{"id": "web"}])))["plugins"]) == 1


def test_a_listed_search_price_counts_by_result() -> None:
    assert bound(chat("native/model:online")).fixed_nanos == 100_000 * 1_000 + 5 * 10_000_000


def test_a_model_that_searches_by_itself_is_held_for_it() -> None:
    assert bound(chat("seeker/model")).fixed_nanos == 100_000 * 1_000 + 5 * 10_000_000


def test_a_search_on_a_model_without_a_known_context_is_refused() -> None:
    assert isinstance(refusal(chat("vast/model:online")), UnboundedCost)


@pytest.mark.parametrize("results", [0, 26, True, "5", 1.5])
def test_results_out_of_range_are_invalid(results: object) -> None:
    error = refusal(chat(plugins=[{"id": "web", "max_results": results}]))
    assert error.code == "invalid_request" and error.param == "plugins.max_results"


# Price caps


def test_the_held_prices_go_out_as_caps() -> None:
    assert bound(chat()).apply(1)["provider"] == {
        "max_price": {"prompt": "1", "completion": "2", "request": "0"}
    }


def test_the_clients_routing_stays_and_its_lower_caps_too() -> None:
    provider = {
        "order": ["openai"],
        "max_price": {"prompt": 0.25, "completion": "99", "audio": 1, "image": None},
    }
    sent = bound(chat(provider=provider)).apply(1)["provider"]
    assert sent == {
        "order": ["openai"],
        "max_price": {"prompt": "0.25", "completion": "2", "request": "0", "audio": "1"},
    }


def test_image_prices_are_capped_when_there_are_images() -> None:
    assert sent(bound(with_parts(image(), model="vision/model")))["provider"]["max_price"]["image"] == "0.001"


def test_the_clients_body_is_left_as_it_was() -> None:
    body = chat("plain/model:online", provider={"max_price": {"prompt": 1}}, plugins=[{"id": "web"}])
    before = json.dumps(body)
    bound(body).apply(5)
    assert json.dumps(body) == before


@pytest.mark.parametrize(
    "value", [-1, "-1", float("nan"), float("inf"), True, "x", [], 1e300, "1e-999999", 10**400]
)
def test_caps_that_are_no_prices_are_invalid(value: object) -> None:
    error = refusal(chat(provider={"max_price": {"prompt": value}}))
    assert isinstance(error, BadRequest) and error.param == "provider.max_price"


# Validation


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": "x" * 257}, "model"),
        ({"model": 5}, "model"),
        ({"model": ["plain/model"]}, "model"),
        ({"models": "plain/model"}, "models"),
        ({"models": [5]}, "models"),
        ({"models": ["plain/model"] * 17}, "models"),
        ({"fallbacks": [{}]}, "fallbacks"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages"),
        ({"messages": [{"content": {"type": "image_url"}}]}, "messages"),
        ({"messages": [{"content": ["text"]}]}, "messages"),
        ({"messages": [{"content": [{"text": "x"}]}]}, "messages"),
        ({"prompt": "Hi"}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 5.0}, "max_tokens"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"user": 5}, "user"),
        ({"provider": []}, "provider"),
        ({"provider": {"max_price": 5}}, "provider.max_price"),
        ({"provider": {"order": "openai"}}, "provider.order"),
        ({"provider": {"only": [5]}}, "provider.only"),
        ({"tools": {}}, "tools"),
        ({"tools": ["function"]}, "tools"),
        ({"functions": {}}, "functions"),
        ({"plugins": {}}, "plugins"),
        ({"plugins": ["web"]}, "plugins"),
        ({"plugins": [{"id": "file-parser", "pdf": []}]}, "plugins"),
        ({"modalities": "text"}, "modalities"),
        ({"modalities": [1]}, "modalities"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], param: str) -> None:
    error = refusal({**chat(), **fields})
    assert (error.status, error.code, error.param) == (400, "invalid_request", param)


@pytest.mark.parametrize(
    "field", ["max_tokens", "max_completion_tokens", "n", "stream", "provider", "tools", "plugins"]
)
def test_null_is_the_same_as_absent(field: str) -> None:
    assert bound(chat(**{field: None})).max_output == 4096


# Completions and embeddings


def completion(prompt: Any = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": "plain/model", "prompt": prompt, **fields}


def embedding(value: Any = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": "embed/model", "input": value, **fields}


@pytest.mark.parametrize(
    ("fields", "choices"),
    [
        ({}, 1),
        ({"n": 2}, 2),
        ({"n": 2, "best_of": 5}, 5),
        ({"prompt": ["a", "b", "c"]}, 3),
        ({"prompt": ["a", "b"], "best_of": 4}, 8),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
    ],
)
def test_every_choice_of_every_prompt_is_an_output(fields: dict[str, Any], choices: int) -> None:
    assert bound({**completion(), **fields}, "completions").output_nanos == choices * 2_000


@pytest.mark.parametrize("prompt", [None, [], {}, 5, [None], [[["a"]]], [[{"type": "image_url"}]]])
def test_a_prompt_of_another_type_is_invalid(prompt: object) -> None:
    assert refusal(completion(prompt), "completions").param == "prompt"


def test_messages_do_not_belong_to_completions() -> None:
    assert refusal(completion(messages=[]), "completions").param == "messages"


def test_every_input_may_be_as_long_as_the_context() -> None:
    upper_bound = bound(embedding(["x" * 9_000, "x" * 9_000]), "embeddings")
    assert upper_bound.fixed_nanos == 2 * 8_000 * 20


def test_embeddings_have_no_output() -> None:
    upper_bound = bound(embedding(), "embeddings")
    assert upper_bound.output_nanos == upper_bound.min_output == upper_bound.max_output == 0


def test_embeddings_set_nothing_but_the_price_caps() -> None:
    assert set(bound(embedding(), "embeddings").apply(0)) == {"provider"}


@pytest.mark.parametrize(
    "value",
    [{"content": [image()]}, image(), {"type": "image_url", "content": None, "image_url": "https://x.y/z"}],
)
def test_images_among_the_inputs_count(value: object) -> None:
    upper_bound = bound(embedding([value], model="plain/model"), "embeddings")
    assert upper_bound.fixed_nanos > IMAGE_TOKENS * 1_000


# Properties

counts = st.integers(0, 30_000)
texts = st.text(alphabet='aZ "\\\n\t\x00é漢😀', max_size=60)
priced = [
    model["id"]
    for model in MODELS
    if model["pricing"]["prompt"] not in ("0", "-1") and ":" not in model["id"]
]
odd = {"boundless/model", "artist/model", "canvas/model", "sketch/model", "voice/model", "singer/model"}
usable = [*sorted(set(priced) - odd), "fixed/model"]
LIMITS = ["max_tokens", "max_completion_tokens"]
limits = st.none() | st.integers(1, 20_000)


@given(
    content=texts,
    size=counts,
    model=st.sampled_from(usable),
    fallback=st.none() | st.sampled_from(usable),
    limit=limits,
    n=st.integers(1, 4),
    split=st.tuples(*[st.integers(0, 100)] * 4),
    escape=st.booleans(),
)
def test_no_split_of_tokens_costs_more_than_the_bound(
    content: str,
    size: int,
    model: str,
    fallback: str | None,
    limit: int | None,
    n: int,
    split: tuple[int, int, int, int],
    escape: bool,
) -> None:
    body = chat(model, n=n, max_tokens=limit, messages=[{"role": "user", "content": content + "x" * size}])
    if fallback is not None:
        body["models"] = [fallback]
    raw = json.dumps(body, ensure_ascii=escape).encode()
    upper_bound = bound_request(CHAT, body, len(raw), INDEX, POLICY)
    for served in (model, fallback or model):
        granted = upper_bound.max_output
        cost = reference_cost(served, len((content + "x" * size).encode()), granted * n, split)
        assert upper_bound.fixed_nanos + upper_bound.output_nanos * granted >= cost


def reference_cost(served: str, text_bytes: int, output: int, split: tuple[int, int, int, int]) -> Decimal:
    """What OpenRouter bills in nano-dollars if `split` percent of the tokens are cached, written and
    reasoned.
    """
    model = next(model for model in MODELS if model["id"] == served)
    prompt = min(text_bytes + 10, model["context_length"] or text_bytes + 10)
    pricing = {name: Decimal(price) for name, price in model["pricing"].items() if isinstance(price, str)}
    for override in model["pricing"].get("overrides", []):
        if prompt > override["min_prompt_tokens"]:
            pricing["prompt"] = Decimal(override["prompt"])
    written, written_1h, reasoned, shorter = split
    base, write = pricing["prompt"], pricing.get("input_cache_write", pricing["prompt"])
    total = pricing.get("request", Decimal(0)) + prompt * base
    total += prompt * written // 100 * (write - base) if write > base else 0
    hour = pricing.get("input_cache_write_1h", write)
    total += prompt * min(written_1h, 100 - written) // 100 * (hour - base) if hour > base else 0
    made = output * shorter // 100
    total += made * pricing["completion"]
    extra = pricing.get("internal_reasoning", Decimal(0)) - pricing["completion"]
    total += made * reasoned // 100 * extra if extra > 0 else 0
    return total * NANOS


@given(size=counts, more=counts, model=st.sampled_from(usable))
def test_a_longer_body_never_costs_less(size: int, more: int, model: str) -> None:
    short, long = (bound(chat(model, padding="x" * length)) for length in (size, size + more))
    assert short.fixed_nanos <= long.fixed_nanos


@given(first=st.sampled_from(usable), second=st.sampled_from(usable))
def test_another_fallback_never_makes_a_request_cheaper(first: str, second: str) -> None:
    alone, both = bound(chat(first)), bound(chat(first, models=[second]))
    assert alone.fixed_nanos <= both.fixed_nanos and alone.output_nanos <= both.output_nanos


@given(limit=limits, granted=st.integers(1, 20_000), model=st.sampled_from(usable))
def test_what_goes_out_never_exceeds_the_grant(limit: int | None, granted: int, model: str) -> None:
    body: dict[str, Any] = {**bound(chat(model, max_tokens=limit)).apply(granted)}
    assert all(body[name] <= granted for name in ("max_tokens", "max_completion_tokens") if name in body)


@given(
    first=st.sampled_from(usable),
    second=st.sampled_from(usable),
    own=st.lists(st.sampled_from(LIMITS), unique=True),
)
def test_every_model_that_takes_a_limit_gets_one_that_it_lists(
    first: str, second: str, own: list[str]
) -> None:
    sent = bound(chat(first, models=[second], **dict.fromkeys(own, 100))).apply(100)
    for name in (first, second):
        model = INDEX.get(name)
        assert model is not None and (not model.limit_fields or model.limit_fields & sent.keys())


@given(
    cap=st.none() | st.integers(0, 100) | st.floats(0.001, 100) | st.decimals(0, 100, places=3).map(str),
    model=st.sampled_from(usable),
)
def test_no_amount_is_ever_a_float(cap: object, model: str) -> None:
    upper_bound = bound(chat(model, provider={"max_price": {"prompt": cap}}))
    caps = sent(upper_bound)["provider"]["max_price"].values()
    assert type(upper_bound.fixed_nanos) is type(upper_bound.output_nanos) is Decimal
    assert all(isinstance(price, str) and Decimal(price) >= 0 for price in caps)


def test_a_deeply_nested_body_is_read_without_recursion() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    assert bound_request(CHAT, chat(metadata=nested), 300_000, INDEX, POLICY).max_output == 4096
