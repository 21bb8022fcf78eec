"""`/generation` knows the true cost: after aborts, late, and from another instance; and it knows nothing of
foreign ids.
"""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import httpx2
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import SandboxTransport, create_app
from sandbox.generation import API_TYPES, FINISHES, Generation, decode, encode
from sandbox.models.pricing import Tokens
from sandbox.models.text_models import MODELS
from sandbox.state import MAX_GENERATIONS, Call, State
from tests.support.sandbox_client import Client

counts = st.integers(0, 2_000_000)
costs = st.integers(0, 10**18).map(lambda femto: Decimal(femto).scaleb(-15))
generations = st.builds(
    Generation,
    created=st.integers(0, 2**32 - 1),
    model=st.sampled_from([model.id for model in MODELS if len(model.endpoints) == 1]),
    provider=st.just(""),
    tokens=st.builds(Tokens, counts, counts, counts, counts, counts, st.integers(0, 50), st.integers(0, 5)),
    cost=costs,
    upstream_cost=costs,
    finish=st.sampled_from(FINISHES),
    api_type=st.sampled_from(API_TYPES),
    streamed=st.booleans(),
    byok=st.booleans(),
    cached_answer=st.booleans(),
    late_lookups=st.integers(0, 255),
)


def with_provider(generation: Generation) -> Generation:
    model = next(model for model in MODELS if model.id == generation.model)
    return replace(generation, provider=model.endpoints[0].provider)


@given(generations, st.integers(0, 2**40 - 1))
def test_an_id_says_everything_in_at_most_120_characters(generation: Generation, nonce: int) -> None:
    generation = with_provider(generation)
    generation_id = encode(generation, nonce)
    assert decode(generation_id) == generation
    assert len(generation_id) <= 120


@given(st.text(max_size=150))
def test_an_id_that_is_not_ours_is_unknown(text: str) -> None:
    assert decode(text) is None
    assert decode(f"gen-1750000000-{text}") is None


async def test_a_changed_id_is_unknown(client: Client) -> None:
    generation_id = (await client.ask()).json()["id"]
    prefix, seconds, payload = generation_id.split("-")
    assert decode(f"{prefix}-{int(seconds) + 1}-{payload}") is None
    assert (await client.look_up(f"{prefix}-{seconds}-{payload[::-1]}")).status_code == 404


async def test_the_generation_costs_what_usage_said(client: Client) -> None:
    answer = (await client.ask(stream=False)).json()
    data = (await client.look_up(answer["id"])).json()["data"]
    assert data["total_cost"] == answer["usage"]["cost"]
    assert (data["tokens_prompt"], data["tokens_completion"]) == (
        answer["usage"]["prompt_tokens"],
        answer["usage"]["completion_tokens"],
    )
    assert (data["model"], data["provider_name"], data["cancelled"]) == (
        answer["model"],
        answer["provider"],
        False,
    )


async def test_embeddings_are_generations_too(client: Client) -> None:
    body = {"model": "openai/text-embedding-3-small", "input": "one two"}
    response = await client.http.send(client.request(path="/embeddings", **body))
    data = (await client.look_up(response.headers["x-generation-id"])).json()["data"]
    assert data["api_type"] == "embeddings"
    assert data["total_cost"] == response.json()["usage"]["cost"] == 2 * 0.00000002


async def test_another_instance_answers_for_an_id_it_has_never_seen(client: Client) -> None:
    answer = (await client.ask()).json()
    other = httpx2.AsyncClient(transport=SandboxTransport(create_app()), base_url=client.http.base_url)
    async with other:
        response = await other.get(
            "/generation", params={"id": answer["id"]}, headers={"Authorization": "Bearer k"}
        )
    assert response.json()["data"]["total_cost"] == answer["usage"]["cost"]


@pytest.mark.parametrize(
    "scenario", ["cost-null", "cost-negative", "cost-nan", "cost-string", "usage-missing", "cut"]
)
async def test_the_generation_knows_the_cost_that_usage_hides(client: Client, scenario: str) -> None:
    truth = (await client.ask()).json()["usage"]["cost"]
    response = await client.open_stream(scenario)
    data = (await client.look_up(response.headers["x-generation-id"])).status_code
    assert data == 404, "in flight"
    try:
        await response.aread()
    except httpx2.RemoteProtocolError:
        assert scenario == "cut"
    data = (await client.look_up(response.headers["x-generation-id"])).json()["data"]
    assert data["total_cost"] == truth


async def test_an_abort_stops_billing_where_the_provider_says_so(client: Client) -> None:
    response = await client.open_stream("slow;ms=1;tokens=500")
    pieces = response.aiter_raw()
    for _ in range(5):
        await anext(pieces)
    await response.aclose()
    data = (await client.look_up(response.headers["x-generation-id"])).json()["data"]
    assert data["cancelled"] is True and data["finish_reason"] is None
    assert 3 <= data["tokens_completion"] < 50
    prompt, completion = data["tokens_prompt"], data["tokens_completion"]
    assert data["total_cost"] == float(prompt * Decimal("0.00000015") + completion * Decimal("0.0000006"))


async def test_an_abort_is_billed_in_full_elsewhere(client: Client) -> None:
    response = await client.open_stream("slow;ms=1;tokens=500", model="google/gemini-2.5-flash")
    await anext(response.aiter_raw())
    await response.aclose()
    data = (await client.look_up(response.headers["x-generation-id"])).json()["data"]
    assert data["cancelled"] is True
    assert data["tokens_completion"] == 500


async def test_an_abort_may_be_known_late(client: Client) -> None:
    response = await client.open_stream("abort;ms=1;times=2")
    await anext(response.aiter_raw())
    await response.aclose()
    lookups = [await client.look_up(response.headers["x-generation-id"]) for _ in range(3)]
    assert [lookup.status_code for lookup in lookups] == [404, 404, 200]
    assert lookups[2].json()["data"]["cancelled"] is True


async def test_a_lost_generation_is_never_found(client: Client) -> None:
    generation_id = (await client.ask("generation-lost")).json()["id"]
    assert {(await client.look_up(generation_id)).status_code for _ in range(300)} == {404}


async def test_a_whole_answer_is_billed_in_full_when_the_client_leaves(client: Client) -> None:
    request = client.request("hang")
    request.extensions["timeout"] = {"read": 0.02}
    with pytest.raises(httpx2.ReadTimeout):
        await client.http.send(request)
    call = client.app.state.calls[-1]
    while call.cost is None:
        await client.look_up(call.generation_id or "")
    assert call.cost > 0


async def test_byok_and_cache_hits_say_where_the_money_went(client: Client) -> None:
    ordinary, own, hit = [(await client.ask(name)).json() for name in ("ordinary", "byok", "cache-hit")]
    assert own["usage"]["cost"] == 0 and own["usage"]["is_byok"] is True
    assert own["usage"]["cost_details"]["upstream_inference_cost"] == ordinary["usage"]["cost"]
    data = (await client.look_up(own["id"])).json()["data"]
    assert (data["total_cost"], data["upstream_inference_cost"]) == (0, ordinary["usage"]["cost"])
    assert hit["usage"]["total_tokens"] == hit["usage"]["cost"] == 0
    assert (await client.look_up(hit["id"])).json()["data"]["response_cache_source_id"]


async def test_a_bill_above_the_hold_is_true(client: Client) -> None:
    ordinary, dear = (await client.ask()).json(), await client.ask("cost-above-hold;factor=100")
    cost = orjson.loads(dear.content)["usage"]["cost"]
    assert cost == pytest.approx(100 * ordinary["usage"]["cost"])
    assert client.app.state.billed == Decimal(str(cost)) * 101 / 100


def test_memory_of_generations_is_bounded() -> None:
    state, call = State(), Call("POST", "/chat/completions", [])
    generation = Generation(0, "openai/gpt-4o-mini", "OpenAI", Tokens(), Decimal(0))
    for number in range(MAX_GENERATIONS + 5):
        state.begin(call, str(number))
        state.end(call, generation)
    assert len(state.generations) == MAX_GENERATIONS and not state.in_flight
