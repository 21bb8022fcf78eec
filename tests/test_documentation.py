"""What /docs says is true, and needs no other host."""

from __future__ import annotations

import asyncio
import re
import shlex

import httpx
import pytest

from gateway.proxy.endpoints import ENDPOINTS
from tests.support import ROOT
from tests.support.gateway import ADMIN_KEY, Gateway

PUBLIC = {
    ("get", "/"),
    ("get", "/health"),
    ("get", "/health/live"),
    ("get", "/health/ready"),
    ("get", "/models"),
    ("get", "/models/providers"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model_id}"),
    ("get", "/v1/models/count"),
    ("get", "/v1/model/{author}/{slug}"),
    ("get", "/v1/models/{author}/{slug}/endpoints"),
    ("get", "/plans"),
    ("get", "/plans/{plan_id}"),
    ("post", "/auth/register"),
}


async def test_the_documentation_page_loads_everything_from_here(gateway: Gateway) -> None:
    page = await gateway.http.get("/docs")
    assert page.status_code == 200
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(assets) == 3
    for asset in assets:
        assert asset.startswith("/docs/assets/")
        assert (await gateway.http.get(asset)).status_code == 200
    assert "https://" not in page.text


async def test_every_operation_has_a_summary_and_every_closed_one_its_security(gateway: Gateway) -> None:
    schema = (await gateway.http.get("/openapi.json")).json()
    assert set(schema["components"]["securitySchemes"]) == {"bearer", "APIKeyHeader"}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            assert operation.get("summary"), (method, path)
            assert operation.get("tags"), (method, path)
            assert bool(operation.get("security")) == ((method, path) not in PUBLIC), (method, path)
            assert "422" not in operation["responses"], (method, path)


async def test_every_json_body_has_an_example_of_its_own_fields(gateway: Gateway) -> None:
    schema = (await gateway.http.get("/openapi.json")).json()
    seen = 0
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content is None:
                continue
            seen += 1
            named = re.search(r"#/components/schemas/(\w+)", str(content["schema"]))
            fields = schema["components"]["schemas"][named.group(1)] if named else content["schema"]
            for example in [content["example"]] if "example" in content else fields.get("examples", [{}]):
                assert example and example.keys() <= fields["properties"].keys(), (method, path)
                assert set(fields.get("required", ())) <= example.keys(), (method, path)
    assert seen > 25


async def test_every_endpoint_of_the_proxy_is_documented_with_an_example_and_every_status(
    gateway: Gateway,
) -> None:
    paths = (await gateway.http.get("/openapi.json")).json()["paths"]
    served = {path for endpoint in ENDPOINTS for path in endpoint.all_paths if path.startswith("/v1/")}
    identifiers = set()
    for path in served:
        operation = paths[path]["post"]
        content = operation["requestBody"]["content"]["application/json"]
        assert set(content["schema"]["required"]) <= content["example"].keys(), path
        assert operation["responses"].keys() == {
            "200",
            "400",
            "401",
            "402",
            "403",
            "404",
            "413",
            "429",
            "502",
            "503",
            "504",
        }
        answer = operation["responses"]["200"]["content"]
        assert "audio/*" in answer or answer["application/json"]["example"]["gateway_usage"]["request_id"]
        identifiers.add(operation["operationId"])
    assert len(identifiers) == len(served) == 10
    assert "multipart/form-data" in paths["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]
    error = paths["/v1/messages"]["post"]["responses"]["429"]["content"]["application/json"]["schema"]
    assert error["properties"]["type"] == {"const": "error"}


async def test_the_form_of_errors_under_openrouter_s_prefix_is_documented_as_it_is(gateway: Gateway) -> None:
    form = (await gateway.http.get("/openapi.json")).json()["components"]["schemas"]["OpenRouterErrorBody"]
    for body in ((await gateway.http.get("/api/v1/nowhere")).json(), *form["examples"]):
        assert set(form["required"]) == body.keys()
        assert (
            set(form["properties"]["error"]["required"]) == body["error"].keys()
            and type(body["error"]["code"]) is int
        )


DOCUMENTS = {"README.md": 3, "CONTRIBUTING.md": 1, "docs/spending.md": 3, "docs/management.md": 3}
"""How many calls each shows, at least."""


def documented_calls(text: str) -> list[list[str]]:
    """The lines of shell that ask a gateway at its default address, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line) for line in lines if line.startswith("curl ") and "http://127.0.0.1:8000" in line
    ]


async def send(gateway: Gateway, words: list[str], values: dict[str, str]) -> httpx.Response:
    """What curl would send; in double quotes or beside single ones, names of variables have their values."""
    known = [re.sub(r"\$(\w+)", lambda match: values[match[1]], word) for word in words]
    written = [
        (option, known[place + 1]) for place, option in enumerate(known[:-1]) if option in ("-H", "-d", "-X")
    ]
    headers = dict(text.split(": ", 1) for option, text in written if option == "-H")
    content = next((text for option, text in written if option == "-d"), None)
    url = next(word for word in known if word.startswith("http://")).replace(
        "http://127.0.0.1:8000", gateway.url
    )
    return await gateway.http.request(
        "GET" if content is None else "POST", url, headers=headers, content=content
    )


@pytest.mark.parametrize("name", DOCUMENTS)
async def test_every_documented_call_works_as_printed(gateway: Gateway, name: str) -> None:
    user = await gateway.register(credits=5)
    request_id = (await user.chat()).headers["x-request-id"]
    body = {"key_name": "for the documents", "environment_tag": "test"}
    made = (await gateway.http.post("/user/api-keys", headers=user.headers, json=body)).json()
    values = {
        "API_KEY": user.key,
        "ADMIN_API_KEY": ADMIN_KEY,
        "TEST_KEY": made["api_key"],
        "REQUEST_ID": request_id,
    }
    calls = documented_calls(await asyncio.to_thread((ROOT / name).read_text))
    assert len(calls) >= DOCUMENTS[name]
    for words in calls:
        response = await send(gateway, words, values)
        expected = (429,) if "x-sandbox-scenario: error-429-upstream" in words else (200, 201)
        assert response.status_code in expected, (words, response.text)


async def test_a_scenario_may_follow_the_model_with_parameters(gateway: Gateway) -> None:
    user = await gateway.register()
    assert (await user.chat(model="openai/gpt-4o-mini:slow;ms=1")).status_code == 200
