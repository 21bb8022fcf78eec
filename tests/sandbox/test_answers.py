"""Whole answers are what the request asked for, in the upstream's shape, at the model's own prices."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any, Literal

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from sandbox import tokens
from sandbox.models.pricing import Tokens
from sandbox.models.text_models import BY_ID
from sandbox.schemas import sample
from tests.support.sandbox_client import Client

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
        },
    },
}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}


def exact(text: str) -> Any:
    return json.loads(text, parse_float=Decimal)


async def test_the_openai_sdk_reads_a_completion(sdk: openai.AsyncOpenAI) -> None:
    completion = await sdk.chat.completions.create(
        model="openai/gpt-4o-mini", messages=[{"role": "user", "content": "Say hi"}]
    )
    assert completion.id.startswith("gen-")
    assert "Say hi" in (completion.choices[0].message.content or "")
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None and completion.usage.total_tokens > 0


async def test_cost_is_tokens_times_prices_in_plain_notation(client: Client) -> None:
    response = await client.ask("ordinary;tokens=1", messages=[{"role": "user", "content": "x"}])
    usage = exact(response.text)["usage"]
    prices = BY_ID["openai/gpt-4o-mini"].endpoints[0].prices
    assert usage["cost"] == 7 * prices.prompt + 1 * prices.completion
    assert '"cost":0.00000165,' in response.text


async def test_the_same_request_gets_the_same_answer_under_another_id(client: Client) -> None:
    first, second = (await client.ask()).json(), (await client.ask()).json()
    assert first["choices"] == second["choices"]
    assert first["id"] != second["id"]


async def test_the_generation_id_is_in_the_header_and_in_the_body(client: Client) -> None:
    response = await client.ask()
    assert response.headers["x-generation-id"] == response.json()["id"]
    assert "x-generation-id" not in (await client.ask("no-generation-id")).headers
    assert "x-generation-id" in (await client.ask("error-503")).headers


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_token_limit_ends_the_answer_with_length(client: Client, name: str) -> None:
    limit: dict[str, Any] = {name: 3}
    answer = (await client.ask(**limit)).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_the_lower_of_two_token_limits_counts(client: Client) -> None:
    answer = (await client.ask(max_tokens=5, max_completion_tokens=2)).json()
    assert answer["usage"]["completion_tokens"] == 2


async def test_a_model_without_max_tokens_ignores_the_limit(client: Client) -> None:
    answer = (await client.ask(model="morph/morph-v3-fast", max_tokens=1)).json()
    assert answer["usage"]["completion_tokens"] > 1


async def test_n_choices_are_all_billed(client: Client) -> None:
    answer = (await client.ask(n=3, max_tokens=4)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 12


async def test_stop_ends_the_answer_before_the_sequence(client: Client) -> None:
    answer = (await client.ask(stop=["read"])).json()
    assert answer["choices"][0]["message"]["content"] == "The sandbox "
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_offered_tools_are_called_with_conforming_arguments(client: Client) -> None:
    choice = (await client.ask(tools=[TOOL])).json()["choices"][0]
    call = choice["message"]["tool_calls"][0]
    arguments = json.loads(call["function"]["arguments"])
    assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "get_weather")
    assert set(arguments) == {"city", "unit"} and arguments["unit"] == "celsius"


async def test_a_tool_result_is_answered_in_words(client: Client) -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "tool", "tool_call_id": "x", "content": "sunny"},
    ]
    choice = (await client.ask(tools=[TOOL], messages=messages)).json()["choices"][0]
    assert "sunny" in choice["message"]["content"]


async def test_tool_choice_none_is_answered_in_words(client: Client) -> None:
    choice = (await client.ask(tools=[TOOL], tool_choice="none")).json()["choices"][0]
    assert choice["finish_reason"] == "stop"


class Part(BaseModel):
    name: str = Field(min_length=3, max_length=20)
    weight: float = Field(gt=0, le=10)


class Machine(BaseModel):
    kind: Literal["pump", "valve"]
    parts: list[Part] = Field(min_length=2)
    pressure: int = Field(ge=7, multiple_of=5)
    note: str | None
    main: Part


async def test_a_json_schema_is_answered_with_a_conforming_value(client: Client) -> None:
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "machine", "schema": Machine.model_json_schema()},
    }
    answer = (await client.ask(response_format=wanted)).json()
    machine = Machine.model_validate_json(answer["choices"][0]["message"]["content"])
    assert len(machine.parts) == 2


async def test_json_object_is_answered_with_an_object(client: Client) -> None:
    answer = (await client.ask(response_format={"type": "json_object"})).json()
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), dict)


@given(st.integers(-50, 50), st.integers(0, 50))
def test_sampled_integers_stay_within_their_bounds(least: int, width: int) -> None:
    value = sample({"type": "integer", "minimum": least, "maximum": least + width}, "x")
    assert isinstance(value, int) and least <= value <= least + width


@given(st.text(max_size=200))
def test_a_text_never_has_more_tokens_than_bytes(text: str) -> None:
    assert tokens.count(text) <= len(text.encode("utf-8", "surrogatepass"))
    assert "".join(tokens.split(text)) == text


@given(st.lists(st.text(max_size=60), min_size=1, max_size=6))
def test_a_prompt_never_exceeds_its_bytes_and_the_allowances(texts: list[str]) -> None:
    messages = [{"role": "user", "content": text} for text in texts]
    bound = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) + 4 * len(texts) + 3
    assert tokens.count_prompt({"messages": messages}).tokens <= bound


async def test_images_count_as_tokens_and_as_a_fee(client: Client) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, PICTURE]}]
    usage = exact((await client.ask("ordinary;tokens=1", model="openai/gpt-4o", messages=messages)).text)[
        "usage"
    ]
    prices = BY_ID["openai/gpt-4o"].endpoints[0].prices
    assert usage["prompt_tokens"] == 85 + 7
    assert usage["cost"] == prices.cost(Tokens(prompt=92, completion=1, images=1)).total


async def test_a_model_without_vision_refuses_images(client: Client) -> None:
    messages = [{"role": "user", "content": [PICTURE]}]
    assert (await client.ask(model="mistralai/mistral-nemo", messages=messages)).status_code == 404


async def test_reasoning_is_shown_counted_and_may_be_excluded(client: Client) -> None:
    model = "anthropic/claude-haiku-4.5"
    plain = (await client.ask(model=model)).json()
    body = (await client.ask(model=model, reasoning={"effort": "low"})).json()
    hidden = (await client.ask(model=model, reasoning={"effort": "low", "exclude": True})).json()
    assert plain["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    assert body["choices"][0]["message"]["reasoning_details"][0]["format"] == "anthropic-claude-v1"
    assert hidden["choices"][0]["message"]["reasoning"] is None
    assert hidden["usage"] == body["usage"]


async def test_reasoning_is_part_of_the_token_limit(client: Client) -> None:
    answer = (await client.ask(model="deepseek/deepseek-r1", max_tokens=10)).json()
    assert answer["usage"]["completion_tokens"] == 10
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 10


async def test_a_failing_model_falls_back_to_the_next(client: Client) -> None:
    answer = (await client.ask(model="openai/gpt-4o:error-503", models=["mistralai/mistral-nemo"])).json()
    assert answer["model"] == "mistralai/mistral-nemo"
    assert (await client.ask("fallback")).json()["model"] != "openai/gpt-4o-mini"


async def test_the_auto_router_answers_with_a_real_model(client: Client) -> None:
    assert (await client.ask(model="openrouter/auto")).json()["model"] == "openai/gpt-4o-mini"


async def test_max_price_is_honoured_to_the_last_digit(client: Client) -> None:
    exactly = {"max_price": {"prompt": 0.15, "completion": 0.6}}
    below = {"max_price": {"prompt": 0.15, "completion": 0.5999}}
    assert (await client.ask(provider=exactly)).status_code == 200
    refused = await client.ask(provider=below)
    assert refused.status_code == 404
    assert refused.json()["error"]["availability"]["code"] == "constraint_filtered"
    assert refused.json()["error"]["availability"]["excluded_by"] == ["max_price"]


async def test_a_price_change_is_refused_under_max_price_and_billed_without(client: Client) -> None:
    held = {"max_price": {"prompt": "0.15", "completion": "0.6"}}
    assert (await client.ask("price-change", provider=held)).status_code == 404
    before, after = exact((await client.ask()).text), exact((await client.ask("price-change")).text)
    assert after["usage"]["cost"] == 2 * before["usage"]["cost"]


async def test_provider_preferences_choose_the_endpoint(client: Client) -> None:
    model = "meta-llama/llama-3.3-70b-instruct"
    assert (await client.ask(model=model)).json()["provider"] == "DeepInfra"
    assert (await client.ask(model=model, provider={"order": ["Groq"]})).json()["provider"] == "Groq"
    assert (await client.ask("dearer-provider", model=model)).json()["provider"] == "Groq"
    assert (await client.ask(model=model, provider={"only": ["nobody"]})).status_code == 404


async def test_the_fixed_price_model_always_costs_the_same(client: Client) -> None:
    for body in ({"max_tokens": 1}, {"n": 4}, {"stream": False}):
        answer = exact((await client.ask(model="sandbox/fixed-price", **body)).text)
        assert answer["usage"]["cost"] == Decimal("0.5")


async def test_web_search_adds_its_fee_and_says_so(client: Client) -> None:
    usage = exact((await client.ask("ordinary;tokens=1", model="openai/gpt-4o-mini:online")).text)["usage"]
    assert usage["server_tool_use_details"]["web_search_requests"] == 1
    assert usage["cost"] > Decimal("0.01")


async def test_a_cached_prompt_is_billed_at_cache_prices(client: Client) -> None:
    part = {"type": "text", "text": "word " * 400, "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "content": [part]}]
    usage = exact((await client.ask(model="anthropic/claude-haiku-4.5", messages=messages)).text)["usage"]
    written = usage["prompt_tokens_details"]["cache_write_tokens"]
    fresh, spoken = usage["prompt_tokens"] - written, usage["completion_tokens"]
    assert written > 400
    assert usage["cost"] == (written * Decimal("1.25") + fresh + spoken * 5) / 1_000_000


def test_a_long_prompt_is_billed_at_its_tier() -> None:
    prices = BY_ID["google/gemini-2.5-pro"].endpoints[0].prices
    assert prices.cost(Tokens(prompt=200_000)).total == Decimal("0.25")
    assert prices.cost(Tokens(prompt=200_001)).total == Decimal("0.5000025")


async def test_text_completions_have_their_own_shape(sdk: openai.AsyncOpenAI) -> None:
    completion = await sdk.completions.create(model="openai/gpt-4o-mini", prompt="Once upon", max_tokens=5)
    assert completion.object == "text_completion"
    assert completion.usage is not None and completion.usage.completion_tokens == 5


async def test_embeddings_are_unit_vectors_in_both_encodings(sdk: openai.AsyncOpenAI) -> None:
    model = "openai/text-embedding-3-small"
    floats = await sdk.embeddings.create(
        model=model, input=["a", "b"], dimensions=64, encoding_format="float"
    )
    packed = await sdk.embeddings.create(model=model, input=["a", "b"], dimensions=64)
    assert [len(item.embedding) for item in floats.data] == [64, 64]
    assert sum(value * value for value in floats.data[0].embedding) == pytest.approx(1)
    assert packed.data[1].embedding == pytest.approx(floats.data[1].embedding, abs=1e-6)
    assert floats.usage.prompt_tokens == 2


async def test_a_chat_model_refuses_embeddings_and_the_reverse(client: Client) -> None:
    assert (await client.ask(model="openai/text-embedding-3-small")).status_code == 400
    request = client.request(path="/embeddings", input="x")
    assert (await client.http.send(request)).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": "hello"},
        {"provider": {"max_price": {"prompt": "cheap"}}},
        {"max_tokens": 0},
        {"n": 0},
        {"model": "nobody/nothing"},
        {"reasoning": {"effort": "low"}, "reasoning_effort": "high"},
        {"model": "sandbox/fixed-price", "messages": [{"role": "user", "content": "?" * 9000}]},
    ],
)
async def test_what_the_upstream_refuses_is_a_400(client: Client, body: dict[str, Any]) -> None:
    assert (await client.ask(**body)).status_code == 400


async def test_a_prompt_and_limit_beyond_the_context_are_refused_by_name(client: Client) -> None:
    error = (await client.ask(model="sandbox/fixed-price", max_tokens=8_190)).json()["error"]
    assert error["metadata"]["error_type"] == "context_length_exceeded"


RICH_SCHEMA = {
    "$defs": {
        "tree": {"type": "object", "properties": {"child": {"$ref": "#/$defs/tree"}, "leaf": {"const": 7}}}
    },
    "type": "object",
    "properties": {
        "tree": {"$ref": "#/$defs/tree"},
        "both": {
            "allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "boolean"}}}]
        },
        "either": {"oneOf": [{"type": "null"}, {"type": "number", "exclusiveMaximum": 0}]},
        "maybe": {"type": ["null", "string"], "format": "date"},
        "pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]},
        "set": {"type": "array", "uniqueItems": True, "minItems": 3, "items": {"type": "string"}},
        "nothing": {"type": "null"},
        "free": {},
    },
    "required": ["unlisted"],
}


def test_schemas_with_references_and_combinators_are_sampled() -> None:
    value = sample(RICH_SCHEMA, "words")
    assert isinstance(value, dict)
    assert value["tree"]["leaf"] == 7 and "child" in value["tree"]
    assert value["both"] == {"a": 1, "b": True}
    assert value["either"] < 0
    assert value["maybe"] == "2026-01-31"
    assert value["pair"] == [1, "words"]
    assert len(set(value["set"])) == 3
    assert (value["nothing"], value["free"], value["unlisted"]) == (None, "words", "words")


def test_a_greedy_schema_is_sampled_within_bounds() -> None:
    fields = {f"f{number}": {"$ref": "#"} for number in range(20)}
    bush = sample({"type": "object", "properties": fields, "required": list(fields)}, "x")
    long = sample({"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**9}}, "x")
    assert isinstance(bush, dict) and isinstance(long, list)
    assert len(str(bush)) < 1_000_000 and len(long) <= 2000


def test_every_kind_of_prompt_is_counted() -> None:
    audio = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "name": "ada", "content": [audio, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert tokens.count_prompt({"messages": messages}).tokens == (3 + 2 + 100 + 1) + (3 + 3) + 3
    assert tokens.count_prompt({"prompt": ["a b", [1, 2, 3]]}).tokens == 5
    assert tokens.count_inputs([[1, 2], "a b"]) == [2, 2]
    assert tokens.count_inputs([1, 2, 3]) == [3]
    assert tokens.count("word " * 10_000) == 12_500


async def test_a_named_tool_is_called_and_its_arguments_obey_the_limit(client: Client) -> None:
    other = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
    named = {"type": "function", "function": {"name": "get_weather"}}
    call = (await client.ask(tools=[other, TOOL], tool_choice=named)).json()["choices"][0]
    short = (await client.ask(tools=[TOOL], max_tokens=4)).json()
    assert call["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 4


async def test_capabilities_that_are_required_and_missing_are_refused(client: Client) -> None:
    strict = await client.ask(
        model="morph/morph-v3-fast", max_tokens=5, provider={"require_parameters": True}
    )
    tools = await client.ask(model="morph/morph-v3-fast", tools=[TOOL])
    assert strict.json()["error"]["availability"]["excluded_by"] == ["require_parameters"]
    assert tools.status_code == 404


async def test_text_completions_stream_too(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.completions.create(
        model="mistralai/mistral-nemo", prompt="Once upon", max_tokens=4, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The sandbox read “"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
