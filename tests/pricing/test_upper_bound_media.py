"""Bounds of /rerank, /images, /audio/speech and /audio/transcriptions: by unit, image, character, second."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.errors import BadRequest, Forbidden, UnboundedCost
from gateway.pricing.candidates import IMAGE_TOKENS
from gateway.pricing.catalog import read_models
from gateway.pricing.upper_bound import BoundPolicy, bound_request
from tests.support.bounds import INDEX, amounts, bound, entry, output_of, refusal, sent

RERANK, IMAGES, SPEECH, TRANSCRIPTIONS = "rerank", "images", "audio/speech", "audio/transcriptions"
FREE = BoundPolicy(4096, free_models=True)
UNIT = 2_000_000


def ranking(documents: Any = ("a", "b"), model: str = "rank/units", **fields: Any) -> dict[str, Any]:
    return {
        "model": model,
        "query": "q",
        "documents": list(documents) if isinstance(documents, tuple) else documents,
        **fields,
    }


def drawing(model: str = "canvas/model", **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "A cat", **fields}


def speech(model: str = "voice/model", **fields: Any) -> dict[str, Any]:
    return {"model": model, "input": "Hello", "voice": "alloy", **fields}


def recording(model: str = "scribe/model", **fields: Any) -> dict[str, Any]:
    return {"model": model, "input_audio": {"data": "AAAA", "format": "wav"}, **fields}


def size(body: dict[str, Any]) -> int:
    return len(json.dumps(body))


# /rerank


@pytest.mark.parametrize(("count", "units"), [(1, 1), (95, 1), (100, 2), (1_000, 27)])
def test_a_search_unit_is_a_query_with_a_hundred_documents(count: int, units: int) -> None:
    upper_bound = bound(ranking(["x" * 395] * count), RERANK)
    # 400 bytes are up to two pieces of 244 tokens, beside the document itself.
    assert upper_bound.fixed_nanos <= (count * 3 // 100 + 1) * UNIT
    assert upper_bound.fixed_nanos >= units * UNIT


def test_long_documents_count_by_their_pieces() -> None:
    body = ranking(["x" * 500_000])
    pieces = 1 + (size(body) + 1) // 244
    assert bound(body, RERANK).fixed_nanos == -(-pieces // 100) * UNIT


def test_a_long_query_makes_more_pieces_of_every_document() -> None:
    short, long = ranking(["x"] * 90), ranking(["x"] * 90, query="q" * 2_000)
    assert bound(short, RERANK).fixed_nanos == UNIT
    assert bound(long, RERANK).fixed_nanos >= -(-90 * 2_000 // 500 // 100) * UNIT


def test_where_tokens_have_a_price_the_query_counts_with_every_document() -> None:
    body = ranking(["x"] * 1_000, model="rank/tokens", query="q" * 100)
    assert bound(body, RERANK).fixed_nanos >= (1_000 * 101) * 50


def test_ranking_has_no_output_and_sends_its_caps() -> None:
    upper_bound = bound(ranking([{"text": "a"}], top_n=1), RERANK)
    assert upper_bound.output_nanos == upper_bound.max_output == 0
    assert upper_bound.apply(0) == {
        "provider": {"max_price": {"prompt": "0", "completion": "0", "request": "0.002"}}
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": None}, "query"),
        ({"query": ""}, "query"),
        ({"query": ["q"]}, "query"),
        ({"documents": None}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": "a"}, "documents"),
        ({"documents": [5]}, "documents"),
        ({"documents": [{}]}, "documents"),
        ({"documents": [{"text": 5}]}, "documents"),
        ({"top_n": 0}, "top_n"),
        ({"tools": [{}]}, "tools"),
        ({"plugins": [{}]}, "plugins"),
        ({"model": None}, "model"),
    ],
)
def test_wrong_fields_of_a_ranking_are_named(fields: dict[str, Any], param: str) -> None:
    error = refusal({**ranking(), **fields}, RERANK)
    assert isinstance(error, BadRequest) and (error.code, error.param) == ("invalid_request", param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (ranking([{"text": "a", "image": "https://x.y/z"}]), "documents"),
        (ranking(model="rank/units:online"), "model"),
        (ranking(provider={"options": {"cohere": {}}}), "provider.options"),
        (ranking(model="video/model"), "model"),
        (ranking(model="openrouter/auto", provider={"max_price": {"prompt": 1, "completion": 1}}), "model"),
        (ranking(service_tier="priority"), "service_tier"),
    ],
)
def test_rankings_without_a_bound_are_refused_by_name(body: dict[str, Any], param: str) -> None:
    error = refusal(body, RERANK)
    assert isinstance(error, UnboundedCost) and error.param == param


def test_a_model_that_names_no_price_is_never_taken_for_free() -> None:
    assert isinstance(refusal(ranking(model="free/model"), RERANK), UnboundedCost)
    for endpoint, body in (
        (RERANK, ranking(model="free/model")),
        (IMAGES, drawing("megapixel/model")),
        (SPEECH, speech("free/model")),
    ):
        with pytest.raises(UnboundedCost):
            bound(body, endpoint, policy=FREE)


def test_a_free_model_ranks_where_free_models_are_on() -> None:
    assert isinstance(refusal(ranking(model="rank/model:free"), RERANK), Forbidden)
    assert bound(ranking(model="rank/model:free"), RERANK, policy=FREE).fixed_nanos == 0


# /images


def test_an_image_is_bounded_exactly() -> None:
    body = drawing()
    upper_bound = bound(body, IMAGES)
    assert upper_bound.fixed_nanos == (size(body) + 256) * 1_000 + 10_000_000
    assert output_of(upper_bound) == (40_000, 20_480, 20_480)
    assert upper_bound.apply(20_480) == {
        "provider": {"max_price": {"prompt": "1", "completion": "0", "request": "0.01"}}
    }


def test_every_image_costs_its_output_and_its_fees() -> None:
    one, four = drawing(), drawing(n=4)
    assert bound(four, IMAGES).output_nanos == 4 * bound(one, IMAGES).output_nanos
    assert bound(four, IMAGES).fixed_nanos == 4 * ((size(four) + 256) * 1_000 + 10_000_000)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"size": "1024x1024"}, 20_480),
        ({"size": "2K"}, 20_480),
        ({"size": "4K"}, 69_632),
        ({"resolution": "4K"}, 69_632),
        ({"size": "4096x4096"}, 69_632),
        ({"size": "2048x4096"}, 9 * 4_096),
        ({"size": "1K", "resolution": "4K"}, 69_632),
        ({"size": "huge"}, 69_632),
        ({"quality": "high", "aspect_ratio": "1:1", "output_format": "png", "seed": 1}, 20_480),
    ],
)
def test_larger_images_have_more_tokens(fields: dict[str, Any], tokens: int) -> None:
    assert bound(drawing(**fields), IMAGES).max_output == tokens


def test_images_priced_as_completions_are_bounded_by_those() -> None:
    assert bound(drawing("sketch/model"), IMAGES).output_nanos == 4_000


def test_references_count_as_images() -> None:
    reference = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 50_000}}
    one, two = (bound(drawing(input_references=[reference] * count), IMAGES).fixed_nanos for count in (1, 2))
    assert IMAGE_TOKENS * 1_000 < two - one < (IMAGE_TOKENS + 200) * 1_000


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ["cat"]}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": "2"}, "n"),
        ({"size": 1024}, "size"),
        ({"resolution": []}, "resolution"),
        ({"input_references": {}}, "input_references"),
        ({"input_references": [{"type": "image_url", "image_url": "u"}] * 17}, "input_references"),
        ({"image": "data:"}, "image"),
        ({"tools": [{}]}, "tools"),
        ({"messages": [{}]}, "messages"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_wrong_fields_of_an_image_are_named(fields: dict[str, Any], param: str) -> None:
    error = refusal({**drawing(), **fields}, IMAGES)
    assert isinstance(error, BadRequest) and (error.code, error.param) == ("invalid_request", param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (drawing("megapixel/model"), "model"),
        (drawing("video/model"), "model"),
        (drawing("boundless/model"), "model"),
        (drawing(input_references=[{"type": "video_url"}]), "input_references"),
        (drawing(input_references=[5]), "input_references"),
        (drawing(input_references=[{"type": ["image_url"]}]), "input_references"),
        (drawing(provider={"options": {"fal": {"num_images": 100}}}), "provider.options"),
    ],
)
def test_images_without_a_bound_are_refused_by_name(body: dict[str, Any], param: str) -> None:
    error = refusal(body, IMAGES)
    assert isinstance(error, UnboundedCost) and error.param == param


# /audio/speech


def test_speech_priced_by_the_character_is_bounded_by_its_bytes() -> None:
    body = speech(input="é" * 200_000, speed=0.25, response_format="mp3")
    upper_bound = bound(body, SPEECH)
    assert upper_bound.fixed_nanos == (size(body) + 256) * 10_000
    assert upper_bound.output_nanos == upper_bound.max_output == 0


def test_speech_priced_by_its_audio_is_held_at_the_models_longest() -> None:
    upper_bound = bound(speech("singer/model", max_tokens=5), SPEECH)
    assert output_of(upper_bound) == (20_000, 8_000, 8_000)
    assert set(upper_bound.apply(8_000)) == {"provider"}


def test_a_price_of_audio_counts_whatever_the_list_calls_its_output() -> None:
    model = entry(
        "new/voice",
        "0.000001",
        "0",
        pricing={"audio_output": "0.00002"},
        architecture={"output_modalities": ["speech"]},
    )
    index = read_models(json.dumps({"data": [model]}).encode())
    assert bound(speech("new/voice"), SPEECH, index=index).output_nanos == 20_000


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (speech("boundless/model"), "model"),
        (speech("free/model"), "model"),
        (speech(input_references=[{"type": "input_audio"}]), "input_references"),
        (speech(provider={"options": {}}), "provider.options"),
    ],
)
def test_speech_without_a_bound_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    error = refusal(body, SPEECH)
    assert isinstance(error, UnboundedCost) and error.param == param


@pytest.mark.parametrize("value", [None, "", 5, ["Hi"]])
def test_speech_needs_a_text(value: object) -> None:
    assert refusal(speech(input=value), SPEECH).param == "input"


# /audio/transcriptions


def test_a_transcription_is_held_for_the_whole_context_at_the_dearer_price() -> None:
    upper_bound = bound(recording(), TRANSCRIPTIONS)
    assert upper_bound.fixed_nanos == 100_000 * 6_000
    assert output_of(upper_bound) == (10_000, 8_000, 8_000)


def test_a_transcription_may_be_priced_by_the_second() -> None:
    upper_bound = bound(recording("embed/model"), TRANSCRIPTIONS)
    assert upper_bound.fixed_nanos == 86_400 * 20


def test_a_transcription_priced_by_the_request_is_that() -> None:
    upper_bound = bound(recording("clerk/model"), TRANSCRIPTIONS)
    assert (*amounts(upper_bound), upper_bound.max_output) == (6_000_000, 0, 0)


def test_a_form_is_bounded_like_a_json_body_and_sets_no_field() -> None:
    form = {
        "model": "scribe/model",
        "language": "en",
        "response_format": "json",
        "temperature": "0",
        "prompt": "x" * 400,
    }
    upper_bound = bound_request(TRANSCRIPTIONS, form, 25_000_000, INDEX, FREE)
    assert upper_bound.fixed_nanos == bound(recording(), TRANSCRIPTIONS).fixed_nanos
    assert (upper_bound.apply(8_000), upper_bound.max_price) == ({}, {})
    assert upper_bound.prompt_estimate < 1_200


def test_a_json_body_gets_the_caps() -> None:
    caps = sent(bound(recording(), TRANSCRIPTIONS))["provider"]["max_price"]
    assert caps == {"prompt": "2", "completion": "10", "request": "0", "audio": "0.000006"}


@pytest.mark.parametrize("body", [recording("deaf/model"), recording("free/model"), recording("video/model")])
def test_transcriptions_without_a_bound_are_refused(body: dict[str, Any]) -> None:
    error = refusal(body, TRANSCRIPTIONS)
    assert isinstance(error, UnboundedCost) and error.param == "model"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_audio": "AAAA"}, "input_audio"),
        ({"input_audio": {}}, "input_audio"),
        ({"stream": True}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"provider": "openai"}, "provider"),
        ({"model": ""}, "model"),
    ],
)
def test_wrong_fields_of_a_transcription_are_named(fields: dict[str, Any], param: str) -> None:
    error = refusal({**recording(), **fields}, TRANSCRIPTIONS)
    assert isinstance(error, BadRequest) and (error.code, error.param) == ("invalid_request", param)
