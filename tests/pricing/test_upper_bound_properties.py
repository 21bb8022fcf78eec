"""What holds for every body: no error but ours, no cheaper bound for more, and never below what the sandbox
bills.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import httpx2
import orjson
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from common.errors import GatewayError
from gateway.pricing.catalog import read_models
from gateway.pricing.upper_bound import Bound, BoundPolicy, bound_request
from gateway.proxy.endpoints import ENDPOINTS, endpoint_of
from gateway.proxy.request import read_request
from sandbox import SandboxTransport, create_app
from tests.support.bounds import CHAT, INDEX, POLICY, chat

BASES: Mapping[str, dict[str, Any]] = {
    CHAT: chat(),
    "completions": {"model": "plain/model", "prompt": "Hi"},
    "embeddings": {"model": "embed/model", "input": "Hi"},
    "responses": {"model": "plain/model", "input": "Hi"},
    "messages": {"model": "plain/model", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]},
    "rerank": {"model": "rank/tokens", "query": "q", "documents": ["a", "b"]},
    "images": {"model": "canvas/model", "prompt": "A cat"},
    "audio/speech": {"model": "singer/model", "input": "Hi"},
    "audio/transcriptions": {"model": "scribe/model", "input_audio": {"data": "AAAA"}},
}
endpoints = st.sampled_from(sorted(BASES))


# No body breaks it

scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(
        [0, -1, 1, 2**63, -(10**40), 1.5, float("nan"), float("inf"), Decimal("NaN"), Decimal("1e400")]
    )
    | st.sampled_from(
        ["", "web", "image_url", "text", "plain/model", "loose/model:online", "\ud800", "@preset/x", "auto"]
    )
    | st.sampled_from(
        ["openrouter/auto", "message", "tool_result", "document", "base64", "url", "content", "reasoning"]
    )
    | st.sampled_from(
        ["openrouter:web_search", "openrouter:datetime", "namespace", "web_search_20250305", "max_cost"]
    )
)
keys = st.sampled_from(
    [
        *(
            "type",
            "id",
            "content",
            "model",
            "max_price",
            "order",
            "image_url",
            "url",
            "prompt",
            "engine",
            "source",
            "data",
        ),
        *(
            "role",
            "output",
            "summary",
            "parameters",
            "max_uses",
            "tools",
            "edits",
            "budget_tokens",
            "step_count",
            "completion",
        ),
        *(
            "max_cost_in_dollars",
            "options",
            "format",
            "text",
            "image",
            "file",
            "enabled",
            "excluded_models",
            "request",
        ),
    ]
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
FIELDS = [
    *(
        "model",
        "models",
        "fallbacks",
        "messages",
        "prompt",
        "input",
        "max_tokens",
        "max_completion_tokens",
        "n",
    ),
    *(
        "best_of",
        "stream",
        "user",
        "provider",
        "tools",
        "functions",
        "plugins",
        "modalities",
        "response_format",
    ),
    *(
        "service_tier",
        "speed",
        "preset",
        "prediction",
        "web_search_options",
        "max_output_tokens",
        "instructions",
        "text",
    ),
    *("background", "conversation", "system", "thinking", "context_management", "output_config", "container"),
    *(
        "stop_server_tools_when",
        "max_tool_calls",
        "query",
        "documents",
        "top_n",
        "size",
        "resolution",
        "input_references",
    ),
    *("input_audio", "image_config", "language"),
]
# More of what is nearly right: half of all junk is refused at its first field.
tools = st.lists(
    st.fixed_dictionaries({"type": scalars}, optional={"parameters": junk, "max_uses": st.integers(0, 40)}),
    max_size=3,
)
caps = st.fixed_dictionaries(
    {"max_price": st.dictionaries(st.sampled_from(["prompt", "completion", "image"]), scalars)}
)
fields = st.dictionaries(st.sampled_from(FIELDS), junk, max_size=4)
near = st.fixed_dictionaries(
    {}, optional={"tools": tools, "provider": caps, "model": st.just("openrouter/auto"), "stream": st.none()}
)


@settings(max_examples=300)
@given(
    endpoint=endpoints, base=endpoints, fields=fields, near=near, size=st.sampled_from([0, 1, 1_000, 10**9])
)
@example(endpoint="messages", base="messages", fields={"messages": [{"content": [[[]]]}]}, near={}, size=10)
@example(
    endpoint="responses", base="responses", fields={"input": [{"type": {}, "role": 5}]}, near={}, size=10
)
@example(endpoint="images", base="images", fields={"size": "99999x99999", "n": 10}, near={}, size=10)
@example(endpoint="rerank", base="rerank", fields={"query": "\ud800"}, near={}, size=10**9)
@example(endpoint="audio/transcriptions", base="images", fields={"language": "\ud800"}, near={}, size=0)
def test_no_body_raises_anything_but_a_gateway_error(
    endpoint: str, base: str, fields: dict[str, Any], near: dict[str, Any], size: int
) -> None:
    try:
        upper_bound = bound_request(endpoint, {**BASES[base], **near, **fields}, size, INDEX, POLICY)
    except GatewayError as refused:
        assert refused.status in (400, 403, 404) and refused.param  # noqa: PT017 - both ways out are checked
        orjson.dumps(refused.body("x"))
    else:
        assert (
            upper_bound.fixed_nanos >= 0
            and upper_bound.output_nanos >= 0
            and 0 <= upper_bound.min_output <= upper_bound.max_output
        )
        assert upper_bound.typical_nanos(1) >= 0
        orjson.dumps(upper_bound.price_basis)


@given(endpoint=endpoints)
def test_every_base_body_is_bounded(endpoint: str) -> None:
    assert bound_request(endpoint, BASES[endpoint], 1_000, INDEX, POLICY).fixed_nanos > 0


@pytest.mark.parametrize("endpoint", ["responses", "messages"])
def test_deeply_nested_content_is_refused_without_recursion(endpoint: str) -> None:
    nested: Any = "x"
    for _ in range(50_000):
        nested = [{"type": "tool_result", "content": nested}]
    body = {
        **BASES[endpoint],
        "input" if endpoint == "responses" else "messages": [{"role": "user", "content": nested}],
    }
    with pytest.raises(GatewayError):
        bound_request(endpoint, body, 10**6, INDEX, POLICY)


# More is never cheaper


@given(endpoint=endpoints, size=st.integers(0, 10**6), more=st.integers(0, 10**6))
def test_a_longer_body_never_costs_less(endpoint: str, size: int, more: int) -> None:
    short, long = (
        bound_request(endpoint, BASES[endpoint], length, INDEX, POLICY) for length in (size, size + more)
    )
    assert short.fixed_nanos <= long.fixed_nanos and short.max_output <= long.max_output


@given(n=st.integers(1, 10), more=st.integers(0, 10), uses=st.integers(1, 15))
def test_more_images_documents_and_uses_never_cost_less(n: int, more: int, uses: int) -> None:
    def total(endpoint: str, **changes: Any) -> Decimal:
        return whole(bound_request(endpoint, {**BASES[endpoint], **changes}, 1_000, INDEX, POLICY))

    def search(count: int) -> Any:
        return [{"type": "openrouter:web_search", "parameters": {"max_uses": count}}]

    assert total("images", n=n) <= total("images", n=min(10, n + more))
    assert total("rerank", documents=["a"] * n) <= total("rerank", documents=["a"] * (n + more))
    assert total("responses", tools=search(uses)) <= total("responses", tools=search(uses + more))


@given(endpoint=st.sampled_from([CHAT, "responses"]), prompt=st.integers(0, 100), more=st.integers(0, 100))
def test_higher_caps_never_make_a_router_cheaper(endpoint: str, prompt: int, more: int) -> None:
    def routed(price: int) -> Bound:
        provider: Any = {"max_price": {"prompt": price, "completion": price}}
        return bound_request(
            endpoint,
            {**BASES[endpoint], "model": "openrouter/auto", "provider": provider},
            1_000,
            INDEX,
            POLICY,
        )

    low, high = routed(prompt), routed(prompt + more)
    assert low.fixed_nanos <= high.fixed_nanos and low.output_nanos <= high.output_nanos


@given(limit=st.integers(1, 8_000), granted=st.integers(1, 8_000))
def test_no_endpoint_sends_more_than_was_granted(limit: int, granted: int) -> None:
    for endpoint, name in (
        (CHAT, "max_tokens"),
        ("responses", "max_output_tokens"),
        ("messages", "max_tokens"),
    ):
        upper_bound = bound_request(endpoint, {**BASES[endpoint], name: limit}, 1_000, INDEX, POLICY)
        assert upper_bound.apply(granted)[name] == min(limit, granted)


def whole(upper_bound: Bound) -> Decimal:
    return upper_bound.fixed_nanos + upper_bound.output_nanos * upper_bound.max_output


# The sandbox never bills more

words = st.text(alphabet='aZ "\\\n\t\x00é漢😀.', max_size=80)
chat_parts = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("text"), "text": words}, optional={"cache_control": st.just({"type": "ephemeral"})}
    )
    | st.just({"type": "image_url", "image_url": {"url": "https://x.y/z.png", "detail": "high"}}),
    max_size=4,
)
chat_messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant"]), "content": words | chat_parts}
    ),
    min_size=1,
    max_size=4,
)
TALKERS = [
    *(
        "openai/gpt-4o",
        "openai/o4-mini",
        "anthropic/claude-sonnet-4.5",
        "google/gemini-2.5-pro",
        "qwen/qwen3-coder-next",
    ),
    *(
        "perplexity/sonar",
        "morph/morph-v3-fast",
        "sandbox/fixed-price",
        "deepseek/deepseek-chat-v3.1",
        "mistralai/mistral-nemo:online",
    ),
]
talkers = st.sampled_from(TALKERS)
chats = st.fixed_dictionaries(
    {"model": talkers, "messages": chat_messages},
    optional={
        "models": st.lists(talkers, max_size=2),
        "max_tokens": st.integers(1, 3_000),
        "max_completion_tokens": st.integers(1, 3_000),
        "n": st.integers(1, 3),
        "reasoning": st.sampled_from([{"effort": "high"}, {"effort": "low"}, {"enabled": True}]),
        "plugins": st.just([{"id": "web", "max_results": 2}]),
        "tools": st.just([{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        "service_tier": st.sampled_from(["auto", "flex"]),
    },
)
completions = st.fixed_dictionaries(
    {"model": st.sampled_from(["openai/gpt-4o-mini", "morph/morph-v3-fast"]), "prompt": words.filter(bool)},
    optional={"max_tokens": st.integers(1, 2_000)},
)
embeddings = st.fixed_dictionaries(
    {
        "model": st.just("openai/text-embedding-3-small"),
        "input": words.filter(bool) | st.lists(words.filter(bool), min_size=1, max_size=4),
    }
)
texts = words.filter(bool)
responses = st.fixed_dictionaries(
    {"model": talkers, "input": texts},
    optional={"max_output_tokens": st.integers(16, 3_000), "instructions": texts},
)
messages = st.fixed_dictionaries(
    {
        "model": talkers,
        "messages": st.builds(lambda text: [{"role": "user", "content": text}], texts),
        "max_tokens": st.integers(1, 3_000),
    },
    optional={"system": texts},
)
rankings = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["cohere/rerank-v3.5", "qwen/qwen3-reranker-8b"]),
        "query": texts,
        "documents": st.lists(
            st.builds(lambda text, times: text * times, texts, st.integers(1, 60)), min_size=1, max_size=30
        ),
    }
)
images = st.fixed_dictionaries(
    {"model": st.sampled_from(["google/gemini-2.5-flash-image", "openai/gpt-5-image-mini"]), "prompt": texts},
    optional={"n": st.integers(1, 10), "quality": st.sampled_from(["low", "medium", "high", "auto"])},
)
speech = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["openai/gpt-4o-mini-tts", "google/gemini-2.5-flash-preview-tts"]),
        "input": texts,
        "voice": st.just("alloy"),
    }
)
recordings = st.builds(
    lambda kilobytes, form: {"data": base64.b64encode(bytes(1_000 * kilobytes)).decode(), "format": form},
    st.integers(1, 300),
    st.sampled_from(["mp3", "wav"]),
)
transcriptions = st.fixed_dictionaries(
    {"model": st.sampled_from(["openai/whisper-1", "openai/gpt-4o-transcribe"]), "input_audio": recordings},
    optional={"prompt": texts},
)
ASKED: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    CHAT: chats,
    "completions": completions,
    "embeddings": embeddings,
    "responses": responses,
    "messages": messages,
    "rerank": rankings,
    "images": images,
    "audio/speech": speech,
    "audio/transcriptions": transcriptions,
}
scenarios = st.sampled_from(
    ["ordinary", "cache-write", "cache-read", "reasoning", "tool-call", "usage-missing", "byok"]
)
POLICY_OF_SANDBOX = BoundPolicy(default_max_output_tokens=4_096, free_models=True)


def test_every_endpoint_is_asked() -> None:
    assert set(ASKED) == {endpoint.name for endpoint in ENDPOINTS}


@pytest.mark.parametrize("endpoint", sorted(ASKED))
@settings(max_examples=30, deadline=None)
@given(data=st.data(), scenario=scenarios, grant=st.sampled_from(["min_output", "max_output"]))
def test_the_sandbox_never_bills_more_than_the_bound(
    endpoint: str, data: st.DataObject, scenario: str, grant: str
) -> None:
    status, billed, bound = asyncio.run(ask(endpoint, data.draw(ASKED[endpoint]), scenario, grant))
    event(f"answered {status}")
    assert billed <= bound


@pytest.mark.parametrize(
    ("endpoint", "model"), [(CHAT, "sandbox/fixed-price"), ("completions", "openai/gpt-4o-mini")]
)
async def test_the_sandbox_answers_what_was_bounded(endpoint: str, model: str) -> None:
    status, billed, bound = await ask(endpoint, {**BASES[endpoint], "model": model}, "ordinary")
    assert status == 200 and 0 < billed <= bound


@pytest.mark.parametrize("endpoint", [CHAT])
async def test_the_sandbox_bills_a_router_within_the_clients_caps(endpoint: str) -> None:
    body = {
        **BASES[endpoint],
        "model": "openrouter/auto",
        "provider": {"max_price": {"prompt": 0.15, "completion": 0.6}},
    }
    status, billed, bound = await ask(endpoint, body, "ordinary")
    assert status == 200 and 0 < billed <= bound


async def ask(
    endpoint: str, body: dict[str, Any], scenario: str, grant: str = "max_output"
) -> tuple[int, Decimal, Decimal]:
    """The status, what was billed and what is held for it (nano-dollars), where as much output is granted as
    this bound of it says.
    """
    headers = {
        "Authorization": "Bearer sk-or-v1-test",
        "x-sandbox-scenario": scenario,
        "content-type": "application/json",
    }
    sandbox = create_app()
    async with httpx2.AsyncClient(
        transport=SandboxTransport(sandbox), base_url="https://openrouter.ai/api/v1", headers=headers
    ) as http:
        index = read_models((await http.get("/models?output_modalities=all")).content)
        raw = orjson.dumps(body)
        parsed = read_request(endpoint_of(endpoint), raw, "application/json")
        upper_bound = bound_request(
            endpoint, parsed.fields, len(raw), index, POLICY_OF_SANDBOX, seconds=parsed.seconds
        )
        granted = getattr(upper_bound, grant)
        response = await http.post(
            f"/{endpoint}", content=orjson.dumps({**body, **upper_bound.apply(granted)})
        )
    generations = sandbox.state.generations.values()
    billed = sum((each.cost + (each.upstream_cost if each.byok else 0) for each in generations), Decimal(0))
    return (
        response.status_code,
        billed.scaleb(9),
        upper_bound.fixed_nanos + upper_bound.output_nanos * granted,
    )
