"""Every management endpoint, one by one: nobody, a key that may not, somebody else's, and the valid call with
its documented fields.

The table is complete: a test compares it with the OpenAPI document. Proxied endpoints (/v1) have tests of
their own.
"""

from __future__ import annotations

from typing import Any, get_args

import httpx
import pytest
import pytest_asyncio

from gateway.proxy.endpoints import ENDPOINTS
from routes.schemas.keys import Resource
from tests.support.endpoint_table import NO_REQUEST, PUBLIC, TABLE, Endpoint, Public, World, make_world
from tests.support.gateway import ADMIN_KEY, Gateway
from tests.support.upstream import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


SCOPED = [endpoint for endpoint in TABLE if endpoint.scope is not None]
FOR_ADMINS = [endpoint for endpoint in TABLE if endpoint.path.startswith("/admin")]
WITH_MISSING = [(endpoint, n) for endpoint in TABLE for n in range(len(endpoint.missing))]
RESOURCES = sorted({endpoint.scope[1] for endpoint in SCOPED if endpoint.scope})


@pytest.fixture
def gateway(stage: tuple[Gateway, Upstream]) -> Gateway:
    stage[1].forget()
    return stage[0]


@pytest_asyncio.fixture(loop_scope="module")
async def world(gateway: Gateway) -> World:
    """One of the test's own, for what changes it."""
    return await make_world(gateway)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(stage: tuple[Gateway, Upstream]) -> World:
    """One for all the tests that are refused."""
    return await make_world(stage[0])


async def call(
    world: World, endpoint: Endpoint, headers: dict[str, str], ids: dict[str, Any], body: Any
) -> httpx.Response:
    return await world.gateway.http.request(
        endpoint.method, world.fill(endpoint.path, **ids) + endpoint.query, headers=headers, json=body
    )


def body_of(endpoint: Endpoint, world: World) -> Any:
    return None if endpoint.body is None else endpoint.body(world)


def headers_for(endpoint: Endpoint, world: World) -> dict[str, str]:
    return ADMIN if endpoint.scope is None else world.user.headers


def documented(schema: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (method.upper(), path)
        for path, operations in schema["paths"].items()
        for method in operations
        if not path.startswith(("/v1/", "/api/v1/"))
    }


async def test_the_table_is_complete(gateway: Gateway) -> None:
    schema = (await gateway.http.get("/openapi.json")).json()
    listed = [*((each.method, each.path) for each in TABLE), *((each.method, each.path) for each in PUBLIC)]
    assert sorted(listed) == sorted(documented(schema))


async def test_scopes_name_what_there_is() -> None:
    checked = {*RESOURCES} | {endpoint.resource for endpoint in ENDPOINTS}
    assert checked == {*get_args(Resource)} - {"*"}


@pytest.mark.parametrize("endpoint", TABLE, ids=str)
async def test_nobody_is_told_to_send_a_key(gateway: Gateway, endpoint: Endpoint) -> None:
    path = (
        endpoint.path.format(user_id=1, key_id=1, plan_id=1, budget_id=1, webhook_id=1, request_id=NO_REQUEST)
        + endpoint.query
    )
    response = await gateway.http.request(endpoint.method, path, json={})
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("endpoint", SCOPED, ids=str)
async def test_a_key_with_every_scope_but_this_one_is_refused(shared: World, endpoint: Endpoint) -> None:
    assert endpoint.scope is not None
    verb, resource = endpoint.scope
    scopes = {
        each: [name for name in RESOURCES if (each, name) != (verb, resource)] for each in ("read", "write")
    }
    made = await shared.gateway.http.post(
        "/user/api-keys",
        headers=shared.user.headers,
        json={"key_name": str(endpoint), "scope_permissions": scopes},
    )
    headers = {"authorization": f"Bearer {made.json()['api_key']}"}
    response = await call(shared, endpoint, headers, {}, body_of(endpoint, shared))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "missing_scope")
    assert response.json()["gateway"]["scope"] == resource


@pytest.mark.parametrize("endpoint", FOR_ADMINS, ids=str)
async def test_a_user_s_key_opens_no_administrator_s_endpoint(shared: World, endpoint: Endpoint) -> None:
    response = await call(shared, endpoint, shared.user.headers, {}, body_of(endpoint, shared))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "missing_scope")


@pytest.mark.parametrize(("endpoint", "number"), WITH_MISSING, ids=str)
async def test_what_is_not_there_or_somebody_else_s_is_a_404_that_names_it(
    shared: World, endpoint: Endpoint, number: int
) -> None:
    ids, body = endpoint.missing[number](shared)
    response = await call(
        shared,
        endpoint,
        headers_for(endpoint, shared),
        ids,
        body if body is not None else body_of(endpoint, shared),
    )
    assert response.status_code == 404, response.text
    assert response.json()["error"]["param"]


@pytest.mark.parametrize(
    "endpoint",
    [e for e in TABLE if e.path.startswith("/user/plan") and e.method in ("GET", "DELETE")],
    ids=str,
)
async def test_without_a_plan_there_is_none_to_see_or_cancel(shared: World, endpoint: Endpoint) -> None:
    response = await call(shared, endpoint, shared.stranger.headers, {}, None)
    assert response.status_code == (404 if endpoint.path == "/user/plan" else 200)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_without_a_provider_key_there_is_none_to_see_or_delete(shared: World, method: str) -> None:
    response = await shared.gateway.http.request(
        method, "/user/provider-key", headers=shared.stranger.headers
    )
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("endpoint", TABLE, ids=str)
async def test_a_valid_call_answers_with_its_documented_fields(world: World, endpoint: Endpoint) -> None:
    response = await call(world, endpoint, headers_for(endpoint, world), {}, body_of(endpoint, world))
    assert response.status_code == endpoint.status, response.text
    assert endpoint.fields <= response.json().keys()
    assert response.headers["x-request-id"] and response.headers["content-type"] == "application/json"
    await world.gateway.database.assert_books_balance()


@pytest.mark.parametrize("endpoint", PUBLIC, ids=lambda e: f"{e.method} {e.path}")
async def test_a_public_endpoint_answers_anybody_and_refuses_nonsense(
    gateway: Gateway, endpoint: Public
) -> None:
    headers = (
        ADMIN if endpoint.method == "POST" else {}
    )  # registration is closed in live mode, but for administrators
    response = await gateway.http.request(
        endpoint.method, endpoint.call or endpoint.path, headers=headers, json=endpoint.body
    )
    assert response.status_code == 200, response.text
    assert not endpoint.fields or endpoint.fields <= response.json().keys()
    for path, body, status, param in endpoint.wrong:
        refused = await gateway.http.request(endpoint.method, path, headers=headers, json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), path
