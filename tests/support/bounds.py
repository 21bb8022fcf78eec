"""What the tests of bounds share: a model list of every kind of price, bodies, and how they are bounded or
refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from common.errors import GatewayError
from gateway.pricing.catalog import ModelIndex, read_models
from gateway.pricing.upper_bound import Bound, BoundPolicy, bound_request

CHAT = "chat/completions"
POLICY = BoundPolicy(default_max_output_tokens=4096, free_models=False)
NANOS = 10**9


def entry(
    model_id: str, prompt: str = "0.000001", completion: str = "0.000002", **changes: Any
) -> dict[str, Any]:
    pricing = {"prompt": prompt, "completion": completion, **changes.pop("pricing", {})}
    return {
        "id": model_id,
        "pricing": pricing,
        "context_length": 100_000,
        "top_provider": {"max_completion_tokens": 8_000},
        "supported_parameters": ["max_tokens", "tools"],
        "architecture": {"output_modalities": ["text"]},
        **changes,
    }


PICTURES = {"output_modalities": ["image"]}
MODELS = [
    entry("plain/model"),
    entry("dear/model", "0.00001", "0.00005", top_provider={"max_completion_tokens": 2_000}),
    entry("cached/model", pricing={"input_cache_write": "0.00000125", "input_cache_write_1h": "0.000002"}),
    entry("tiered/model", pricing={"overrides": [{"min_prompt_tokens": 2_000, "prompt": "0.000009"}]}),
    entry("thinking/model", pricing={"internal_reasoning": "0.00001"}),
    entry("vision/model", pricing={"image": "0.001", "image_token": "0.000004"}),
    entry("ear/model", pricing={"audio": "0.00003"}),
    entry(
        "painter/model",
        pricing={"image_output": "0.00003"},
        architecture={"output_modalities": ["text", "image"]},
    ),
    entry(
        "speaker/model",
        pricing={"audio_output": "0.00008"},
        architecture={"output_modalities": ["text", "audio"]},
    ),
    entry("artist/model", architecture={"output_modalities": ["image"]}),
    entry(
        "seeker/model",
        pricing={"web_search": "0.01"},
        supported_parameters=["max_tokens", "web_search_options"],
    ),
    entry("native/model", pricing={"web_search": "0.01"}),
    entry("video/model", pricing={"video_second": "0.1"}),
    entry("fixed/model", "0", "0", pricing={"request": "0.5"}),
    entry("free/model", "0", "0"),
    entry("plain/model:free", "0", "0"),
    entry("plain/model:batch", "0.0000005"),
    entry("router/auto", "-1", "-1"),
    entry("modern/model", supported_parameters=["max_completion_tokens"]),
    entry("loose/model", supported_parameters=["tools"]),
    entry("boundless/model", supported_parameters=[], context_length=None, top_provider={}),
    entry("vast/model", context_length=None, top_provider={}),
    entry("anthropic/model"),
    entry("eyed/model", pricing={"image": "0.001", "audio": "0.00003"}),
    entry(
        "canvas/model",
        "0.000001",
        "0",
        pricing={"image_output": "0.00004", "request": "0.01"},
        architecture={"output_modalities": ["image"]},
    ),
    entry(
        "sketch/model",
        "0",
        "0.000004",
        supported_parameters=[],
        architecture={"output_modalities": ["image"]},
    ),
    entry("megapixel/model", "0", "0", architecture={"output_modalities": ["image"]}),
    entry(
        "voice/model", "0.00001", "0", supported_parameters=[], architecture={"output_modalities": ["speech"]}
    ),
    entry(
        "singer/model",
        "0.000001",
        "0.000002",
        pricing={"audio_output": "0.00002"},
        architecture={"output_modalities": ["audio"]},
    ),
    entry(
        "scribe/model",
        "0.000002",
        "0.00001",
        pricing={"audio": "0.000006"},
        architecture={"output_modalities": ["text"]},
    ),
    entry("clerk/model", "0", "0", pricing={"request": "0.006"}, context_length=None, top_provider={}),
    entry("deaf/model", "0.000002", "0.00001", context_length=None, top_provider={}),
    entry(
        "rank/units", "0", "0", pricing={"request": "0.002"}, architecture={"output_modalities": ["rerank"]}
    ),
    entry("rank/tokens", "0.00000005", "0", architecture={"output_modalities": ["rerank"]}),
    entry("rank/model:free", "0", "0", architecture={"output_modalities": ["rerank"]}),
    entry("openrouter/auto", "-1", "-1", context_length=200_000),
    entry(
        "embed/model",
        "0.00000002",
        "0",
        context_length=8_000,
        architecture={"output_modalities": ["embeddings"]},
    ),
]
BOTH_LIMITS = entry("both/model", supported_parameters=["max_tokens", "max_completion_tokens"])
INDEX = read_models(json.dumps({"data": MODELS}).encode())


def chat(model: str | None = "plain/model", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], **fields}


def bound(
    body: Mapping[str, Any], endpoint: str = CHAT, policy: BoundPolicy = POLICY, index: ModelIndex = INDEX
) -> Bound:
    return bound_request(endpoint, body, len(json.dumps(body)), index, policy)


def refusal(body: Mapping[str, Any], endpoint: str = CHAT) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        bound(body, endpoint)
    return caught.value


def sent(upper_bound: Bound) -> dict[str, Any]:
    """The fields that go out with one granted token, to look into."""
    return {**upper_bound.apply(1)}


def amounts(upper_bound: Bound) -> tuple[Any, Any]:
    """The fixed part and the price of an output token, to compare with integers."""
    return upper_bound.fixed_nanos, upper_bound.output_nanos


def output_of(upper_bound: Bound) -> tuple[Any, int, int]:
    return upper_bound.output_nanos, upper_bound.min_output, upper_bound.max_output


def with_parts(*parts: Any, model: str = "plain/model", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": list(parts)}], **fields}


def image(url: str = "https://example.com/a.png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


PDF = {"type": "file", "file": {"filename": "a.pdf", "file_data": "https://example.com/a.pdf"}}
PDF_PARSER = {"id": "file-parser", "pdf": {"engine": "cloudflare-ai"}}
