"""Can the cost of what is not text be bounded from the request and the price list alone?

The rules a client can apply: rerank, the request price for every 100 pieces of 500 tokens (a byte is at least a token), and
the prompt price; speech, the prompt price per byte and the output price for all the model may put out; transcripts, the
dearest of prompt and audio price for the whole context; images, the image price for all the model may put out, for each.
"""

from __future__ import annotations

import base64
import json
import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.app import ENDPOINTS
from sandbox.market import Market
from sandbox.models_media import MEDIA
from sandbox.planning import Ask, Limits
from sandbox.scenarios import parse_scenarios

ORDINARY = ("ordinary", "dearer-provider", "cache-read", "byok", "cache-hit", "usage-missing", "tool-call", "reasoning")
texts = st.text(min_size=1, max_size=300)
scenarios = st.sampled_from(ORDINARY)


def cost(path: str, body: dict[str, Any], scenario: str) -> Decimal:
    plan, _ = ENDPOINTS[path](body, Ask(parse_scenarios(scenario), Limits(), Market()))
    return plan.generation.cost + plan.generation.upstream_cost


def price(model: Any, *names: str) -> Decimal:
    """The dearest of these prices, as listed."""
    return max(Decimal(str(model.endpoints[0].pricing.get(name, "0"))) for name in names)


def those(output: str) -> Any:
    return st.sampled_from([model for model in MEDIA if output in model.outputs])


@given(those("rerank"), texts, st.lists(texts, min_size=1, max_size=30), st.integers(1, 60), scenarios)
def test_a_ranking_stays_below_its_units(model: Any, query: str, documents: list[str], times: int, scenario: str) -> None:
    documents = [document * times for document in documents]
    lengths = [len(document.encode()) for document in documents]
    pieces = sum(max(1, math.ceil(length / 500)) for length in lengths)
    units = math.ceil(pieces / 100)
    most = units * price(model, "request") + (sum(lengths) + len(query.encode())) * price(model, "prompt")
    assert cost("/rerank", {"model": model.id, "query": query, "documents": documents}, scenario) <= most


@given(those("speech"), texts, st.integers(1, 13), scenarios)
def test_speech_stays_below_its_bytes_and_the_models_output(model: Any, text: str, times: int, scenario: str) -> None:
    text = text * times
    most = len(text.encode()) * price(model, "prompt") + (model.max_completion or 0) * price(model, "completion", "audio_output")
    assert cost("/audio/speech", {"model": model.id, "input": text}, scenario) <= most


@settings(max_examples=30, deadline=None)  # megabytes of audio take longer on a busy machine
@given(those("transcription"), st.integers(1, 23_000), texts, scenarios)
def test_a_transcript_stays_below_the_context(model: Any, kilobytes: int, prompt: str, scenario: str) -> None:
    audio = {"data": base64.b64encode(bytes(1000 * kilobytes)).decode(), "format": "mp3"}
    most = model.context * price(model, "prompt", "audio") + price(model, "request")
    assert cost("/audio/transcriptions", {"model": model.id, "input_audio": audio, "prompt": prompt}, scenario) <= most


@given(those("image"), texts, st.integers(1, 10), st.sampled_from(["low", "medium", "high", "auto"]), scenarios)
def test_images_stay_below_the_models_output(model: Any, prompt: str, number: int, quality: str, scenario: str) -> None:
    each = model.max_completion * price(model, "image_output", "completion") + price(model, "request")
    body = {"model": model.id, "prompt": prompt, "n": number, "quality": quality}
    assert cost("/images", body, scenario) <= number * each + len(json.dumps(body)) * price(model, "prompt")


@pytest.mark.parametrize("path", ["/chat/completions", "/responses", "/messages"])
def test_one_model_costs_what_it_can_cost_at_most(path: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    said = {"input": messages} if path == "/responses" else {"messages": messages, "max_tokens": 10}
    assert cost(path, {"model": "sandbox/fixed-price", **said}, "ordinary") == Decimal("0.5")
