"""Keys are required, failures and catalog have the right shape, limits are kept, calls can be observed, and
every scenario is documented.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

import httpx2
import pytest

from sandbox import SCENARIOS, SandboxTransport, create_app
from sandbox.app import ENDPOINTS
from sandbox.failures import FAILURES, KEY_HASH
from sandbox.models.text_models import MODELS
from tests.support import ROOT
from tests.support.sandbox_client import Client

DOC = ROOT / "docs" / "sandbox.md"
KEY = {"Authorization": "Bearer sk-or-v1-test"}
BODY = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize("path", [path for path in ENDPOINTS if path != "/messages"])
async def test_inference_without_a_key_is_a_401(client: Client, path: str) -> None:
    response = await client.http.post(path, json=BODY)
    assert response.status_code == 401
    assert response.json()["error"] == {"message": "Missing Authentication header", "code": 401}


async def test_generations_need_a_key_and_models_do_not(client: Client) -> None:
    assert (await client.http.get("/generation?id=gen-1-1")).status_code == 401
    assert (await client.http.get("/models")).status_code == 200
    assert (await client.http.get("/nothing")).status_code == 404


@pytest.mark.parametrize("name", sorted(FAILURES))
async def test_every_failure_has_its_status_and_names_the_operator(client: Client, name: str) -> None:
    response = await client.ask(name, stream=True)
    failure, body = FAILURES[name], response.json()
    assert response.status_code == failure.status
    assert body["user_id"].startswith("user_")
    assert body["error"].get("code", body["error"].get("http_status")) == failure.status


async def test_failures_carry_their_headers_and_leaks(client: Client) -> None:
    assert (await client.ask("error-429")).headers["x-ratelimit-reset"] == "1765680060000"
    assert (await client.ask("error-429-upstream")).headers["retry-after"] == "3"
    assert (await client.ask("error-503")).headers["retry-after"] == "7"
    assert KEY_HASH in (await client.ask("error-402-key-limit")).text


async def test_odd_bodies_come_with_status_200(client: Client) -> None:
    html, cut = await client.ask("html-body"), await client.ask("invalid-json")
    assert html.headers["content-type"].startswith("text/html") and html.text.startswith("<!DOCTYPE")
    assert cut.status_code == 200
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        cut.json()
    assert set((await client.ask("error-in-200")).json()) == {"error"}
    assert set((await client.ask("error-in-200-choices")).json()) > {"error", "choices"}
    died = (await client.ask("provider-died")).json()["choices"][0]
    assert died["finish_reason"] == "error" and died["message"]["content"]


async def test_an_error_in_200_is_json_even_where_a_stream_was_asked_for(client: Client) -> None:
    response = await client.ask("error-in-200", stream=True)
    assert response.headers["content-type"] == "application/json"
    assert (await client.look_up(response.headers["x-generation-id"])).json()["data"]["total_cost"] == 0


async def test_a_whole_answer_may_be_late_or_stall(client: Client) -> None:
    assert (await client.ask("slow-first-token;seconds=0.01")).status_code == 200
    request = client.request("stall")
    request.extensions["timeout"] = {"read": 0.02}
    with pytest.raises(httpx2.ReadTimeout):
        await client.http.send(request)


async def test_a_redirect_points_to_another_host(client: Client) -> None:
    response = await client.ask("redirect")
    assert response.status_code == 302
    assert httpx2.URL(response.headers["location"]).host == "elsewhere.invalid"


@pytest.mark.parametrize("stream", [True, False])
async def test_an_oversized_answer_has_the_size_asked_for(client: Client, stream: bool) -> None:
    assert len((await client.ask("oversized;bytes=100000", stream=stream)).content) > 100_000


async def test_scenarios_combine_and_come_as_a_model_suffix(client: Client) -> None:
    suffix = await client.ask(model="openai/gpt-4o-mini:usage-empty-choices:crlf", stream=True)
    header = await client.ask("usage-empty-choices, crlf", stream=True)
    free = await client.ask(model="meta-llama/llama-3.3-70b-instruct:free:byok")
    assert suffix.text.count("\r\n") == header.text.count("\r\n") > 0
    assert '"choices":[],"usage"' in suffix.text and '"choices":[],"usage"' in header.text
    assert free.json()["model"] == "meta-llama/llama-3.3-70b-instruct:free"


@pytest.mark.parametrize(
    "scenario", ["nonsense", "slow;ms=x", "slow;colour=1", "ordinary;factor=2", "slow;ms=-1"]
)
async def test_an_unknown_scenario_or_parameter_is_a_400(client: Client, scenario: str) -> None:
    assert (await client.ask(scenario)).status_code == 400


async def test_models_have_prices_as_decimal_strings(client: Client) -> None:
    models = (await client.http.get("/models?output_modalities=all")).json()["data"]
    assert len(models) >= 16
    for model in models:
        for name, price in model["pricing"].items():
            if name == "discount":
                assert isinstance(price, int | float)
            elif name != "overrides":
                assert is_price(price), (model["id"], name)


def is_price(text: object) -> bool:
    try:
        return isinstance(text, str) and "E" not in text and Decimal(text).is_finite()
    except InvalidOperation:
        return False


async def test_models_are_listed_by_what_they_put_out(client: Client) -> None:
    ids = {model["id"] for model in (await client.http.get("/models")).json()["data"]}
    embedding = (await client.http.get("/models?output_modalities=embeddings")).json()["data"]
    assert "openai/text-embedding-3-small" not in ids
    assert [model["id"] for model in embedding] == ["openai/text-embedding-3-small"]
    assert len((await client.http.get("/models?offset=2&limit=3")).json()["data"]) == 3


async def test_endpoints_show_every_provider_with_its_price(client: Client) -> None:
    data = (await client.http.get("/models/meta-llama/llama-3.3-70b-instruct/endpoints")).json()["data"]
    prices = {item["provider_name"]: item["pricing"]["completion"] for item in data["endpoints"]}
    assert prices == {"DeepInfra": "0.00000039", "Groq": "0.00000079"}
    assert (await client.http.get("/models/nobody/nothing/endpoints")).status_code == 404


async def test_a_lasting_price_change_shows_in_the_catalog_and_in_the_bill(client: Client) -> None:
    before = (await client.ask()).json()["usage"]["cost"]
    assert (await client.http.put("/sandbox/prices", json={"factor": "3"})).status_code == 200
    model = (await client.http.get("/model/openai/gpt-4o-mini")).json()["data"]
    assert model["pricing"]["prompt"] == "0.00000045"
    assert (await client.ask()).json()["usage"]["cost"] == pytest.approx(3 * before)
    assert (await client.http.put("/sandbox/prices", json={"factor": "-1"})).status_code == 400


async def test_calls_show_bodies_and_bills_but_no_secret(client: Client) -> None:
    answer = (await client.ask(user="u1")).json()
    seen = (await client.http.get("/sandbox/calls")).json()
    call = seen["calls"][-1]
    assert seen["counts"] == {"/chat/completions": 1}
    assert (call["body"]["user"], call["id"], call["cost"]) == ("u1", answer["id"], answer["usage"]["cost"])
    assert "authorization" not in call["headers"] and "sk-or" not in str(seen)
    assert (await client.http.delete("/sandbox/calls")).json()["calls"] == []


async def test_the_bill_is_the_sum_of_all_costs(client: Client) -> None:
    for model in ("sandbox/fixed-price", "sandbox/fixed-price"):
        await client.ask(model=model)
    bill = (await client.http.get("/sandbox/bill")).json()
    assert (bill["total"], bill["count"], bill["in_flight"]) == ("1", 2, 0)


async def test_answers_stay_within_the_byte_limit() -> None:
    transport = SandboxTransport(create_app(max_answer_bytes=1000))
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://sandbox.invalid/v1", headers=KEY
    ) as http:
        long = await http.post(
            "/chat/completions", json=BODY, headers={"x-sandbox-scenario": "ordinary;tokens=9000"}
        )
        wide = await http.post("/chat/completions", json=BODY, headers={"x-sandbox-scenario": "oversized"})
    choice = long.json()["choices"][0]
    assert len(choice["message"]["content"].encode()) <= 1000 and choice["finish_reason"] == "length"
    assert len(wide.content) < 3000


@pytest.mark.parametrize(("scenario", "status"), [("hang", 504), ("stall", 200)])
async def test_answers_end_at_the_time_limit(scenario: str, status: int) -> None:
    app = create_app(max_seconds=0.05)
    async with httpx2.AsyncClient(transport=SandboxTransport(app), base_url="http://sandbox.invalid") as http:
        headers = {**KEY, "x-sandbox-scenario": scenario}
        response = await http.post("/chat/completions", json={**BODY, "stream": True}, headers=headers)
    assert response.status_code == status
    assert '"code":504' in response.text
    assert not app.state.in_flight


async def test_a_greedy_request_stays_small_under_the_byte_limit() -> None:
    transport = SandboxTransport(create_app(max_answer_bytes=1000))
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://sandbox.invalid", headers=KEY
    ) as http:
        headers = {"x-sandbox-scenario": "ordinary;tokens=1000000000"}
        response = await http.post("/chat/completions", json={**BODY, "n": 128}, headers=headers)
    assert len(response.json()["choices"]) == 128
    assert sum(len(choice["message"]["content"].encode()) for choice in response.json()["choices"]) <= 1000


async def test_the_key_shows_what_was_used(client: Client) -> None:
    await client.ask(model="sandbox/fixed-price")
    data = (await client.http.get("/key", headers=KEY)).json()["data"]
    assert (data["usage"], data["limit"]) == (0.5, None)
    credits = (await client.http.get("/credits", headers=KEY)).json()["data"]
    assert credits == {"total_credits": 1_000_000, "total_usage": 0.5}


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b""])
async def test_a_body_that_is_no_json_object_is_a_400(client: Client, content: bytes) -> None:
    assert (await client.http.post("/chat/completions", content=content, headers=KEY)).status_code == 400


async def test_a_huge_body_is_a_413(client: Client) -> None:
    content = b" " * (32 * 1024 * 1024 + 1)
    assert (await client.http.post("/chat/completions", content=content, headers=KEY)).status_code == 413


@pytest.mark.parametrize(
    "body", [{}, {"input": []}, {"input": "x", "dimensions": 0}, {"input": "word " * 9000}]
)
async def test_embeddings_that_the_upstream_refuses_are_a_400(
    client: Client, body: dict[str, object]
) -> None:
    request = {"model": "openai/text-embedding-3-small", **body}
    assert (await client.http.post("/embeddings", json=request, headers=KEY)).status_code == 400


def test_the_documentation_lists_every_scenario_as_the_code_does() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.+?) \| `(.+)` \|$", DOC.read_text(), re.MULTILINE)
    assert {name: text.replace("\\|", "|") for name, text, _ in rows} == dict(SCENARIOS)
    assert all(name in line for name, _, line in rows)


async def test_every_documented_line_about_an_endpoint_works(client: Client) -> None:
    text = DOC.read_text()
    posts = re.findall(r"^\| `POST (/\S+)` \|.*`post (/\S+) '(\{.*?\})'(?: .*)?` \|$", text, re.MULTILINE)
    assert {path for path, _, _ in posts} == set(ENDPOINTS)
    for path, asked, body in posts:
        assert path == asked
        assert (await client.http.post(path, content=body, headers=KEY)).status_code == 200, path
    gets = re.findall(r"^\| `GET /.*`get '?(/.*?)'?` \|$", text, re.MULTILINE)
    assert len(gets) == 5
    for line in gets:
        wanted = 404 if line.startswith("/generation") else 200
        assert (await client.http.get(line, headers=KEY)).status_code == wanted, line


def test_the_documentation_lists_every_model_with_its_limits() -> None:
    rows = re.findall(
        r"^\| `([a-z0-9.:/-]+)` \| ([\d,]+) \| ([\d,]*) \| (.+?) \| .+ \|$", DOC.read_text(), re.MULTILINE
    )
    told = {
        name: (number(context), number(most), providers.split(", "))
        for name, context, most, providers in rows
    }
    known = {
        model.id: (model.context, model.max_completion, [item.provider for item in model.endpoints])
        for model in MODELS
    }
    assert told == known


def number(text: str) -> int | None:
    return int(text.replace(",", "")) if text else None
