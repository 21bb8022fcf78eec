"""Bounds of /responses and /messages: each field is counted, or refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.errors import BadRequest, ModelNotFound, UnboundedCost
from gateway.pricing.candidates import IMAGE_TOKENS
from gateway.pricing.upper_bound import bound_request
from tests.support.bounds import INDEX, PDF_PARSER, POLICY, amounts, bound, chat, output_of, refusal

RESPONSES, MESSAGES = "responses", "messages"
PNG = "data:image/png;base64,"
CONTEXT = 100_000 * 1_000


def response(value: Any = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": "plain/model", "input": value, **fields}


def parts(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def message(*blocks: Any, **fields: Any) -> dict[str, Any]:
    content = list(blocks) or "Hi"
    return {
        "model": "plain/model",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": content}],
        **fields,
    }


def picture(data: str = "AA") -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def document(**source: Any) -> dict[str, Any]:
    return {"type": "document", "source": source}


def fixed(body: dict[str, Any], endpoint: str) -> int:
    return int(bound(body, endpoint).fixed_nanos)


# /responses


def test_a_response_is_bounded_exactly() -> None:
    body = response(max_output_tokens=500)
    upper_bound = bound(body, RESPONSES)
    assert upper_bound.fixed_nanos == (len(json.dumps(body)) + 256) * 1_000
    assert output_of(upper_bound) == (2_000, 500, 500)
    assert upper_bound.apply(500) == {
        "provider": {"max_price": {"prompt": "1", "completion": "2", "request": "0"}},
        "max_output_tokens": 500,
    }


def test_every_item_has_an_allowance() -> None:
    body = response(parts({"type": "input_text", "text": "Hi"}))
    assert fixed(body, RESPONSES) == (len(json.dumps(body)) + 256 + 16) * 1_000


@pytest.mark.parametrize("model", ["plain/model", "modern/model"])
def test_a_granted_output_goes_out_in_the_endpoints_own_field(model: str) -> None:
    sent = bound(response(model=model), RESPONSES).apply(77)
    assert sent["max_output_tokens"] == 77 and not {"max_tokens", "max_completion_tokens"} & sent.keys()


def test_a_response_of_a_model_without_limits_is_held_at_its_maximum() -> None:
    upper_bound = bound(response(model="loose/model", max_output_tokens=5), RESPONSES)
    assert (
        upper_bound.min_output,
        upper_bound.max_output,
        upper_bound.apply(8_000)["max_output_tokens"],
    ) == (8_000, 8_000, 5)


def test_images_of_an_input_count_instead_of_their_bytes() -> None:
    large = response(parts({"type": "input_image", "image_url": PNG + "A" * 20_000}))
    small = response(parts({"type": "input_image", "image_url": PNG}))
    assert fixed(large, RESPONSES) == fixed(small, RESPONSES) > IMAGE_TOKENS * 1_000


def test_images_in_the_results_of_functions_count() -> None:
    item = {
        "type": "function_call_output",
        "call_id": "c",
        "output": [{"type": "input_image", "image_url": "https://x.y/z"}],
    }
    assert fixed(response([item]), RESPONSES) > IMAGE_TOKENS * 1_000


def test_images_made_earlier_count() -> None:
    item = {"type": "image_generation_call", "id": "i", "result": "A" * 20_000}
    assert IMAGE_TOKENS * 1_000 < fixed(response([item]), RESPONSES) < (IMAGE_TOKENS + 1_000) * 1_000


def test_an_audio_input_may_fill_the_context() -> None:
    body = response(
        parts({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}), model="ear/model"
    )
    assert fixed(body, RESPONSES) == 100_000 * 30_000


def test_a_file_may_fill_the_context() -> None:
    body = response(parts({"type": "input_file", "file_data": "A" * 400_000}), plugins=[PDF_PARSER])
    assert fixed(body, RESPONSES) == CONTEXT
    assert bound(body, RESPONSES).prompt_estimate < 1_200


@pytest.mark.parametrize("kind", ["web_search_call", "openrouter:web_search"])
def test_what_a_tool_found_earlier_may_fill_the_context(kind: str) -> None:
    assert fixed(response([{"type": kind, "id": "w"}]), RESPONSES) == CONTEXT


@pytest.mark.parametrize(
    "item",
    [
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "x", "annotations": []}],
        },
        {
            "type": "reasoning",
            "id": "r",
            "summary": [{"type": "summary_text", "text": "x"}],
            "encrypted_content": "xyz",
        },
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "done"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "done"},
    ],
)
def test_items_of_text_cost_their_bytes(item: dict[str, Any]) -> None:
    body = response([item])
    assert fixed(body, RESPONSES) == (len(json.dumps(body)) + 256 + 16) * 1_000


@pytest.mark.parametrize(
    "item",
    [
        {"type": "item_reference", "id": "x"},
        {"id": "x"},
        {"type": None, "id": "x"},
        {"type": "compaction", "encrypted_content": "x"},
        {"type": "context_compaction"},
        {"type": "additional_tools", "tools": [{"type": "openrouter:fusion"}]},
        {"type": "mcp_call"},
        {"type": "computer_call_output"},
        {"type": []},
        {"role": "user", "content": [{"type": "input_video", "video_url": "x"}]},
        {"type": "function_call_output", "output": [{"type": "computer_screenshot"}]},
    ],
)
def test_items_of_unknown_cost_are_refused(item: dict[str, Any]) -> None:
    error = refusal(response([item]), RESPONSES)
    assert isinstance(error, UnboundedCost) and error.param == "input"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"preset": "mine"}, "preset"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"modalities": ["video"]}, "modalities"),
        ({"plugins": [{"id": "fusion"}]}, "plugins"),
        ({"tools": [{"type": "web_search_preview", "max_uses": 2, "engine": "native"}]}, "tools"),
        ({"tools": [{"type": "web_search", "parameters": {"max_uses": 30, "engine": "native"}}]}, "tools"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools"),
        ({"tools": [{"type": "computer_use_preview"}]}, "tools"),
        ({"tools": [{"type": "image_generation"}]}, "tools"),
        ({"tools": [{"type": "mcp", "server_url": "https://x.y"}]}, "tools"),
        ({"tools": [{"type": "shell"}]}, "tools"),
        ({"tools": [{"type": "openrouter:fusion"}]}, "tools"),
        ({"tools": [{"type": "namespace", "tools": [{"type": "mcp"}]}]}, "tools"),
        ({"tools": [{}]}, "tools"),
    ],
)
def test_fields_of_a_response_without_a_bound_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refusal(response(**fields), RESPONSES)
    assert isinstance(error, UnboundedCost) and error.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": {}}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["Hi"]}, "input"),
        ({"instructions": ["Hi"]}, "instructions"),
        ({"text": "json"}, "text"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"n": 2}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"model": None}, "model"),
        ({"tools": [{"type": "namespace", "tools": {}}]}, "tools.tools"),
    ],
)
def test_wrong_fields_of_a_response_are_named(fields: dict[str, Any], param: str) -> None:
    error = refusal({**response(), **fields}, RESPONSES)
    assert isinstance(error, BadRequest) and (error.code, error.param) == ("invalid_request", param)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "background": False,
            "store": False,
            "truncation": "auto",
            "reasoning": {"effort": "high"},
            "include": [],
        },
        {
            "tools": [
                {"type": "function", "name": "f"},
                {"type": "custom", "name": "g"},
                {"type": "local_shell"},
            ]
        },
        {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]}]},
        {"text": {"format": {"type": "json_object"}, "verbosity": "low"}},
        {"service_tier": "flex", "parallel_tool_calls": True, "user": "u"},
    ],
)
def test_what_a_response_may_ask_for_passes(fields: dict[str, Any]) -> None:
    assert bound(response(**fields), RESPONSES).max_output == 4096


def test_a_schema_of_a_response_gets_an_allowance() -> None:
    body = response(text={"format": {"type": "json_schema", "schema": {}}})
    assert fixed(body, RESPONSES) == (len(json.dumps(body)) + 256 + 1_024) * 1_000


@pytest.mark.parametrize("kind", ["web_search", "web_search_preview", "web_search_2025_08_26"])
def test_a_hosted_search_with_its_uses_is_held_like_openrouters(kind: str) -> None:
    upper_bound = bound(response(tools=[{"type": kind, "max_uses": 2}]), RESPONSES)
    assert upper_bound.fixed_nanos == 4 * CONTEXT + 2 * 20_000_000
    assert upper_bound.apply(1)["tools"] == [{"type": kind, "max_uses": 2, "engine": "exa"}]


def test_a_hosted_search_without_its_uses_may_be_used_once() -> None:
    upper_bound = bound(response(tools=[{"type": "web_search", "external_web_access": False}]), RESPONSES)
    assert upper_bound.fixed_nanos == 3 * CONTEXT + 20_000_000
    assert upper_bound.apply(1)["tools"] == [
        {"type": "web_search", "external_web_access": False, "max_uses": 1, "engine": "exa"}
    ]
    native = {"type": "web_search_20250305", "name": "web_search"}
    assert bound(message(tools=[native], model="anthropic/model"), MESSAGES).apply(1)["tools"] == [
        {**native, "max_uses": 1}
    ]


def test_fallbacks_and_plugins_of_a_response_count() -> None:
    body = response(models=["dear/model"], plugins=[{"id": "web"}])
    assert fixed(body, RESPONSES) == 100_000 * 10_000 + 20_000_000


# /messages


def test_a_message_is_bounded_exactly() -> None:
    body = message()
    upper_bound = bound(body, MESSAGES)
    assert upper_bound.fixed_nanos == (len(json.dumps(body)) + 256 + 16) * 1_000
    assert output_of(upper_bound) == (2_000, 100, 100)
    assert upper_bound.apply(100) == {
        "provider": {"max_price": {"prompt": "1", "completion": "2", "request": "0"}},
        "max_tokens": 100,
    }


def test_an_hours_cache_writes_count() -> None:
    cached = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    body = message(cached, model="cached/model")
    assert fixed(body, MESSAGES) == (len(json.dumps(body)) + 256 + 16) * 2_000


@pytest.mark.parametrize("model", ["plain/model", "modern/model"])
def test_the_limit_of_a_message_is_max_tokens_whatever_the_model_lists(model: str) -> None:
    sent = bound(message(model=model), MESSAGES).apply(50)
    assert sent["max_tokens"] == 50 and "max_completion_tokens" not in sent


def test_a_message_without_a_limit_gets_one() -> None:
    body = message()
    del body["max_tokens"]
    assert bound(body, MESSAGES).apply(77)["max_tokens"] == 77


def test_images_of_a_message_count_instead_of_their_bytes() -> None:
    assert (
        fixed(message(picture("A" * 20_000)), MESSAGES)
        == fixed(message(picture()), MESSAGES)
        > IMAGE_TOKENS * 1_000
    )


def test_images_in_the_results_of_tools_count() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [picture(), picture()]}
    assert fixed(message(result), MESSAGES) > 2 * IMAGE_TOKENS * 1_000


def test_images_in_documents_count() -> None:
    assert fixed(message(document(type="content", content=[picture()])), MESSAGES) > IMAGE_TOKENS * 1_000


def test_data_that_is_no_image_counts_in_bytes() -> None:
    block = {"type": "image", "source": {"type": "url", "url": "https://x.y/z", "data": "A" * 50_000}}
    assert fixed(message(block), MESSAGES) > 50_000 * 1_000 + IMAGE_TOKENS * 1_000


@pytest.mark.parametrize(
    "source", [{"type": "base64", "data": "A" * 400_000}, {"type": "url", "url": "https://x.y/a.pdf"}]
)
def test_a_document_may_fill_the_context(source: dict[str, Any]) -> None:
    assert fixed(message(document(**source), plugins=[PDF_PARSER]), MESSAGES) == CONTEXT


def test_a_document_whose_parser_may_charge_by_the_page_is_refused() -> None:
    error = refusal(message(document(type="url", url="https://x.y/a.pdf")), MESSAGES)
    assert isinstance(error, UnboundedCost) and error.param == "plugins"


def test_pages_that_were_found_earlier_may_fill_the_context() -> None:
    block = {"type": "web_search_tool_result", "tool_use_id": "t", "content": []}
    assert fixed(message(block), MESSAGES) == CONTEXT


@pytest.mark.parametrize(
    "block",
    [
        {"type": "text", "text": "x"},
        {"type": "thinking", "thinking": "x", "signature": "y"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"deep": [{"type": "image"}]}},
        {"type": "tool_result", "tool_use_id": "t", "content": "x"},
        {"type": "tool_result", "tool_use_id": "t"},
        {"type": "search_result", "source": "x", "title": "y", "content": [{"type": "text", "text": "z"}]},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}},
    ],
)
def test_blocks_of_text_cost_their_bytes(block: dict[str, Any]) -> None:
    body = message(block)
    assert fixed(body, MESSAGES) == (len(json.dumps(body)) + 256 + 16) * 1_000


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "source": {"type": "file", "file_id": "f"}},
        {"type": "image", "source": {}},
        {"type": "document", "source": {"type": "file", "file_id": "f"}},
        {"type": "container_upload", "file_id": "f"},
        {"type": "mcp_tool_use"},
        {"type": "compaction", "content": "x"},
        {"type": "tool_addition", "tools": [{"type": "openrouter:fusion"}]},
        {"type": "tool_result", "content": [{"type": "tool_result"}]},
        {"type": "document", "source": {"type": "content", "content": [{"type": "document"}]}},
        {"type": "input_audio"},
    ],
)
def test_blocks_of_unknown_cost_are_refused(block: dict[str, Any]) -> None:
    error = refusal(message(block), MESSAGES)
    assert isinstance(error, UnboundedCost) and error.param == "messages"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mcp_servers": [{"url": "https://x.y"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management"),
        ({"context_management": {"edits": [5]}}, "context_management"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"speed": "fast"}, "speed"),
        ({"system": [{"type": "image", "source": {}}]}, "system"),
        ({"tools": [{"type": "web_search_20260209", "name": "web_search", "max_uses": 1}]}, "tools"),
        ({"tools": [{"type": "code_execution_20250825", "name": "code_execution"}]}, "tools"),
        ({"tools": [{"type": "advisor_20260301", "name": "advisor", "max_uses": 1}]}, "tools"),
        ({"tools": [{"type": "openrouter:bash", "parameters": {"engine": "openrouter"}}]}, "tools"),
        ({"tools": [{"type": "bash_20250124x", "name": "bash"}]}, "tools"),
        ({"tools": [{"type": 5}]}, "tools"),
        (
            {"tools": [{"type": "web_search_20250305", "max_uses": 1}, {"type": "openrouter:datetime"}]},
            "tools",
        ),
    ],
)
def test_fields_of_a_message_without_a_bound_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refusal(message(**fields), MESSAGES)
    assert isinstance(error, UnboundedCost) and error.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hi"]}, "messages"),
        ({"messages": [{"content": {}}]}, "messages"),
        ({"messages": [{"content": ["Hi"]}]}, "messages"),
        ({"system": {}}, "system"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": "9"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}, "max_tokens": None}, "thinking.budget_tokens"),
        ({"thinking": True}, "thinking"),
        ({"context_management": []}, "context_management"),
        ({"output_config": 5}, "output_config"),
        ({"n": 2}, "n"),
    ],
)
def test_wrong_fields_of_a_message_are_named(fields: dict[str, Any], param: str) -> None:
    error = refusal({**message(), **fields}, MESSAGES)
    assert isinstance(error, BadRequest) and (error.code, error.param) == ("invalid_request", param)


@pytest.mark.parametrize(
    "schema",
    [{"output_config": {"format": {"type": "json_schema"}}}, {"output_format": {"type": "json_schema"}}],
)
def test_a_schema_of_a_message_gets_an_allowance(schema: dict[str, Any]) -> None:
    body = {**message(), **schema}
    assert fixed(body, MESSAGES) == (len(json.dumps(body)) + 256 + 1_024 + 16) * 1_000


@pytest.mark.parametrize(
    "fields",
    [
        {
            "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
            "thinking": {"type": "adaptive"},
        },
        {"thinking": {"type": "enabled", "budget_tokens": 99}, "service_tier": "standard_only"},
        {
            "tools": [
                {"name": "f", "input_schema": {}},
                {"type": "custom", "name": "g"},
                {"type": "bash_20250124", "name": "bash"},
            ]
        },
        {
            "tools": [
                {"type": "text_editor_20250728"},
                {"type": "computer_20250124"},
                {"type": "memory_20250818"},
            ]
        },
        {
            "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
            "metadata": {"user_id": "u"},
        },
    ],
)
def test_what_a_message_may_ask_for_passes(fields: dict[str, Any]) -> None:
    assert bound(message(**fields), MESSAGES).max_output == 100


def test_anthropics_own_tools_get_an_allowance_each() -> None:
    body = message(tools=[{"type": "bash_20250124", "name": "bash"}])
    assert fixed(body, MESSAGES) == (len(json.dumps(body)) + 256 + 16 + 1_024 + 64 + 1_024) * 1_000


ANTHROPIC_SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}


@pytest.mark.parametrize("models", [{}, {"model": "anthropic/model", "models": ["plain/model"]}])
def test_anthropics_search_on_models_that_ignore_its_limit_is_refused(models: dict[str, Any]) -> None:
    error = refusal(message(tools=[ANTHROPIC_SEARCH], **models), MESSAGES)
    assert isinstance(error, UnboundedCost) and error.param == "tools"


def test_anthropics_search_is_held_for_its_uses_and_every_round_of_its_loop() -> None:
    upper_bound = bound(message(tools=[ANTHROPIC_SEARCH], model="anthropic/model"), MESSAGES)
    assert amounts(upper_bound) == (11 * CONTEXT + 3 * 20_000_000, 11 * 2_000)


def test_no_condition_of_the_client_shortens_the_providers_own_loop() -> None:
    stop = [{"type": "step_count_is", "step_count": 1}, {"type": "max_cost", "max_cost_in_dollars": 0}]
    assert (
        fixed(
            message(tools=[ANTHROPIC_SEARCH], stop_server_tools_when=stop, model="anthropic/model"), MESSAGES
        )
        == 11 * CONTEXT + 3 * 20_000_000
    )


def test_fallbacks_of_a_message_count() -> None:
    assert bound(message(fallbacks=[{"model": "dear/model"}]), MESSAGES).output_nanos == 50_000
    assert isinstance(refusal(message(fallbacks=[{"model": "no/model"}]), MESSAGES), ModelNotFound)


@pytest.mark.parametrize("make", [response, message])
def test_the_same_text_costs_the_same_in_every_dialect(make: Any) -> None:
    endpoint = RESPONSES if make is response else MESSAGES
    upper_bound = bound_request(endpoint, make(), 5_000, INDEX, POLICY)
    assert (
        abs(
            upper_bound.fixed_nanos
            - bound_request("chat/completions", chat(), 5_000, INDEX, POLICY).fixed_nanos
        )
        <= 16_000
    )
