"""No field of any request body takes what it should not.

The cases are made from the OpenAPI document: each field of each management body, with wrong types, null,
emptiness, length, signs, sizes, NUL and half surrogates, and each parameter of a path or query. The answer is
a 4xx that names the field and changes nothing, never a 5xx. `make fuzz` looks for cases that nobody thought
of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from common.validation_messages import PATTERNS
from tests.support.endpoint_table import PUBLIC, TABLE, Endpoint, World, make_world
from tests.support.gateway import ADMIN_KEY, Gateway
from tests.support.upstream import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
HUGE = 10**30
WITH_BODY = [endpoint for endpoint in TABLE if endpoint.body is not None]
REGISTER = Endpoint(
    "POST",
    "/auth/register",
    None,
    set(),
    lambda w: {"username": f"bad{w.user.id}", "email": "bad@example.com"},
)
FULL: dict[str, dict[str, Any]] = {
    # Fields that only mean something together with others.
    "budget": {"budget_window": "day"},
    "budget_window": {"budget": 1},
}
Case = tuple[tuple[str, ...], Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(stage: tuple[Gateway, Upstream]) -> World:
    return await make_world(stage[0])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def schema(stage: tuple[Gateway, Upstream]) -> dict[str, Any]:
    return dict((await stage[0].http.get("/openapi.json")).json())


# What is wrong for a field, by its schema.


def resolved(schema: dict[str, Any], part: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A field's schema without references and alternatives, and whether it may be null. Amounts are numbers,
    though texts would do.
    """
    if "$ref" in part:
        return resolved(schema, schema["components"]["schemas"][part["$ref"].split("/")[-1]])
    if "anyOf" in part:
        kinds = [resolved(schema, each)[0] for each in part["anyOf"] if each.get("type") != "null"]
        return kinds[0], len(kinds) < len(part["anyOf"])
    return part, False


def each_of(path: tuple[str, ...], *values: Any) -> Iterator[Case]:
    return ((path, value) for value in values)


def wrong(schema: dict[str, Any], part: dict[str, Any], path: tuple[str, ...]) -> Iterator[Case]:
    """Every value that this field must refuse, and where it stands."""
    part, nullable = resolved(schema, part)
    if not nullable:
        yield path, None
    kind = part.get("type")
    if kind in ("integer", "number"):
        yield from each_of(path, "x", "", "NaN", [], {}, True, -HUGE, HUGE, "\x00")
        if kind == "integer":
            yield from each_of(path, 1.5, "1e400")
        if part.get("minimum", part.get("exclusiveMinimum", -1)) >= 0:
            yield path, -1
        if part.get("exclusiveMinimum") == 0 or part.get("minimum") == 1:
            yield path, 0
        if "maximum" in part:
            yield path, part["maximum"] + 1
    elif kind == "string":
        yield from each_of(path, 5, 1.5, True, [], {}, "\ud800", "a\x00b")
        if "enum" in part or "const" in part or part.get("minLength") or "format" in part:
            yield path, ""
        if "enum" in part or "const" in part or "format" in part:
            yield path, "nonsense"
        if "maxLength" in part:
            yield path, "x" * (part["maxLength"] + 1)
    elif kind == "boolean":
        yield from each_of(path, "perhaps", [], {}, 2, HUGE, "\x00")
    elif kind == "array":
        yield from each_of(path, "x", 5, {}, True)
        if "maxItems" in part:
            yield path, ["x"] * (part["maxItems"] + 1)
        if part.get("minItems"):
            yield path, []
        yield from wrong(schema, part["items"], (*path, "0"))
    elif kind == "object":
        yield from each_of(path, "x", 5, [], True)
        for name, each in part.get("properties", {}).items():
            yield from wrong(schema, each, (*path, name))


def placed(base: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The order with this value at its place."""
    body: dict[str, Any] = json.loads(json.dumps({**base, **FULL.get(path[0], {})}))
    at: Any = body
    for name, following in zip(path, (*path[1:], None), strict=True):
        empty: Any = value if following is None else [] if following == "0" else {}
        if isinstance(at, list):
            at[:1] = [empty if following is None or not at else at[0]]
            at = at[0]
        else:
            at[name] = empty if following is None or name not in at else at[name]
            at = at[name]
    return body


def body_schema(schema: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    operation = schema["paths"][endpoint.path][endpoint.method.lower()]
    return resolved(schema, operation["requestBody"]["content"]["application/json"]["schema"])[0]


async def send(world: World, endpoint: Endpoint, content: bytes) -> httpx.Response:
    headers = ADMIN if endpoint.scope is None else world.user.headers
    return await world.gateway.http.request(
        endpoint.method, world.fill(endpoint.path), headers=headers, content=content
    )


STATE = """
select md5(string_agg(t, '|' order by t)) from (
    select to_jsonb(u)::text from public.users u union all select to_jsonb(k)::text from public.api_keys_new k
    union all select to_jsonb(o)::text from public.api_keys o union all select to_jsonb(p)::text
    from public.plans p
    union all select to_jsonb(a)::text from public.user_plans a union all select to_jsonb(l)::text
    from public.rate_limit_configs l
    union all select to_jsonb(c)::text from public.credit_transactions c) as x (t)
"""


@pytest.mark.parametrize("endpoint", [*WITH_BODY, REGISTER], ids=str)
async def test_no_field_takes_what_it_should_not(
    world: World, schema: dict[str, Any], endpoint: Endpoint
) -> None:
    assert endpoint.body is not None
    base, before, wrongs, count = endpoint.body(world), await world.gateway.database.value(STATE), [], 0
    for name, part in body_schema(schema, endpoint)["properties"].items():
        for path, value in wrong(schema, part, (name,)):
            count += 1
            response = await send(world, endpoint, json.dumps(placed(base, path, value)).encode())
            param = str(response.json().get("error", {}).get("param"))
            if response.status_code != 400 or not f"{param}.".startswith(f"{'.'.join(path)}."):
                wrongs.append((".".join(path), repr(value)[:60], response.status_code, param))
    assert count >= 5
    assert wrongs == []
    assert await world.gateway.database.value(STATE) == before


@pytest.mark.parametrize("endpoint", [*WITH_BODY, REGISTER], ids=str)
async def test_no_body_is_taken_that_is_no_order(world: World, endpoint: Endpoint) -> None:
    bodies = (
        b"", b"null", b"[]", b"5", b'"x"', b"{", b"\x00", b"\xff\xfe", b'{"a":NaN}', b"[" * 20_000,
        b'{"a":' * 20_000, b"1" * 10_000, b'{"\\ud800": 1}', b'{"\\u0000": 1}',
    )  # fmt: skip
    optional = endpoint.path.endswith("/rotate")  # takes no body as well
    for body in bodies:
        if optional and body in (b"", b"null", b"1" * 10_000):  # absurdly long integers are read as null
            continue
        response = await send(world, endpoint, body)
        assert response.status_code == 400, (body[:20], response.text)
        assert response.json()["error"]["type"] == "invalid_request_error"
    if endpoint is not REGISTER:  # where clients may send more than we read
        assert endpoint.body is not None
        response = await send(world, endpoint, json.dumps({**endpoint.body(world), "misspelt": 1}).encode())
        assert (response.status_code, response.json()["error"]["param"]) == (400, "misspelt")


@pytest.mark.parametrize("kind", ["", "application/x-www-form-urlencoded", "text/plain"])
async def test_a_body_is_json_whatever_it_is_called(world: World, kind: str) -> None:
    """What `curl -d` sends is called a form unless somebody says otherwise."""
    wrongs = []
    for endpoint in (*WITH_BODY, REGISTER):
        headers = {
            **(ADMIN if endpoint.scope is None else world.user.headers),
            **({"content-type": kind} if kind else {}),
        }
        assert endpoint.body is not None
        wrong_field = {"username": 5} if endpoint is REGISTER else {"misspelt": 1}
        for content, param, said in (
            (
                json.dumps({**endpoint.body(world), **wrong_field}).encode(),
                next(iter(wrong_field)),
                next(iter(wrong_field)),
            ),
            (
                b"name=value",
                None,
                "is not valid JSON (Expecting value: line 1 column 1 (char 0)). Send a JSON object, "
                'such as {"name"',
            ),
            (b"[1]", None, 'The request body must be a JSON object, such as {"name": "value"}.'),
        ):
            response = await world.gateway.http.request(
                endpoint.method, world.fill(endpoint.path), headers=headers, content=content
            )
            error = response.json()["error"]
            if (response.status_code, error["param"]) != (400, param) or said not in error["message"]:
                wrongs.append((str(endpoint), content[:20], error))
    assert wrongs == []


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (b"{}", "`body` is missing."),
        (b'{"body": {}, "query": 1}', "`query` is not a known field; check its spelling."),
        (b"", 'The request body is missing: send a JSON object, such as {"name": "value"}.'),
    ],
)
async def test_a_field_may_have_the_name_of_a_part_of_the_request(
    world: World, order: bytes, message: str
) -> None:
    headers = {**world.user.headers, "content-type": "application/x-www-form-urlencoded"}
    response = await world.gateway.http.post("/v1/quote", headers=headers, content=order)
    assert (response.status_code, response.json()["error"]["message"]) == (400, message)


# Parameters of paths and queries.


def parameters(schema: dict[str, Any]) -> list[tuple[Endpoint, dict[str, Any]]]:
    found = []
    for endpoint in TABLE:
        operation = schema["paths"][endpoint.path][endpoint.method.lower()]
        found += [(endpoint, parameter) for parameter in operation.get("parameters", ())]
    return found


async def test_no_parameter_takes_what_it_should_not(world: World, schema: dict[str, Any]) -> None:
    before, wrongs, cases = await world.gateway.database.value(STATE), [], 0
    for endpoint, parameter in parameters(schema):
        name, (part, _) = parameter["name"], resolved(schema, parameter["schema"])
        kind = part.get("type")
        values = {"integer": ["x", "1.5", "-1", "0", str(HUGE), "%00", "", "1e9"]}.get(
            str(kind), ["%00", "a%00b"]
        )
        if "enum" in part or part.get("format") == "date-time":
            values += ["nonsense", "", "9" * 40]
        if "maxLength" in part:
            values += ["x" * (part["maxLength"] + 1)]
        if parameter["in"] == "path":
            values = [value for value in values if value]  # that is another path
        for value in values:
            cases += 1
            path = world.fill(endpoint.path, **({name: value} if parameter["in"] == "path" else {}))
            path += endpoint.query
            path += f"{'&' if endpoint.query else '?'}{name}={value}" if parameter["in"] == "query" else ""
            headers = ADMIN if endpoint.scope is None else world.user.headers
            content = json.dumps(endpoint.body(world)).encode() if endpoint.body else b""
            response = await world.gateway.http.request(
                endpoint.method, path, headers=headers, content=content
            )
            if (response.status_code, response.json().get("error", {}).get("param")) != (400, name):
                wrongs.append((str(endpoint), name, value[:40], response.status_code))
    assert cases > 100
    assert wrongs == []
    assert await world.gateway.database.value(STATE) == before


# What the types cannot say.


@pytest.mark.parametrize(
    ("order", "status", "param"),
    [
        ({"expiration_days": 36501}, 400, "expiration_days"),
        ({"ip_allowlist": ["10.0.0.0/33"]}, 400, "ip_allowlist.0"),
        ({"ip_allowlist": ["10.0.0.1/8"]}, 400, "ip_allowlist.0"),
        ({"ip_allowlist": ["10.0.0.0/8", "2001:db8::/129"]}, 400, "ip_allowlist.1"),
        ({"ip_allowlist": ["10.0.0.0 /8"]}, 400, "ip_allowlist.0"),
        ({"ip_allowlist": ["fe80::1%eth0"]}, 400, "ip_allowlist.0"),
        ({"ip_allowlist": [""]}, 400, "ip_allowlist.0"),
        ({"domain_referrers": ["*"]}, 400, "domain_referrers.0"),
        ({"domain_referrers": ["*.*.com"]}, 400, "domain_referrers.0"),
        ({"domain_referrers": ["https://a.com"]}, 400, "domain_referrers.0"),
        ({"domain_referrers": ["a.com/path"]}, 400, "domain_referrers.0"),
        ({"domain_referrers": ["a.com:443"]}, 400, "domain_referrers.0"),
        ({"domain_referrers": ["-a.com"]}, 400, "domain_referrers.0"),
        ({"domain_referrers": ["a..com"]}, 400, "domain_referrers.0"),
        ({"domain_referrers": ["ä.com"]}, 400, "domain_referrers.0"),
        ({"allowed_models": ["open*ai"]}, 400, "allowed_models.0"),
        ({"scope_permissions": {"read": ["*", "a b"]}}, 400, "scope_permissions.read.1"),
        ({"scope_permissions": {"fly": ["*"]}}, 400, "scope_permissions.fly"),
        ({"budget": 1}, 400, "budget_window"),
        ({"budget_window": "day"}, 400, "budget"),
        ({"budget": 1e-10, "budget_window": "day"}, 400, "budget"),
        ({"max_requests": 0}, 400, "max_requests"),
        ({"key_name": "second"}, 409, "key_name"),
    ],
    ids=str,
)
async def test_a_key_order_that_makes_no_sense_names_its_field(
    world: World, order: dict[str, Any], status: int, param: str
) -> None:
    response = await world.gateway.http.post(
        "/user/api-keys", headers=world.user.headers, json={"key_name": "another", **order}
    )
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), response.text


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/user/usage?start=2026-02-01T00:00:00Z&end=2026-01-01T00:00:00Z", "end"),
        ("/user/usage?start=2026-01-01T00:00:00Z&end=2026-01-01T00:00:00Z", "end"),
        ("/user/usage?start=1000-01-01T00:00:00Z", "start"),
        ("/user/usage?timezone=Moon/Sea", "timezone"),
        ("/user/usage/records?start=2026-02-01T00:00:00Z&end=2026-01-01T00:00:00Z", "end"),
        ("/user/usage/records?start=2026-01-01T00:00:00", "start"),
        ("/user/transactions?start=2026-02-01T00:00:00Z&end=2026-01-01T00:00:00Z", "end"),
        (
            "/user/api-keys/audit-logs?start_date=2026-02-01T00:00:00Z&end_date=2026-01-01T00:00:00Z",
            "end_date",
        ),
        ("/user/usage/records?cursor=bm9uc2Vuc2U", "cursor"),
        ("/user/transactions?cursor=LTE", "cursor"),
    ],
)
async def test_times_in_the_wrong_order_and_foreign_cursors_name_their_field(
    world: World, path: str, param: str
) -> None:
    response = await world.gateway.http.get(path, headers=world.user.headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_limits_of_zero_are_limits_and_not_mistakes(world: World) -> None:
    body = {
        "user_id": world.stranger.id,
        "rate_limits": dict.fromkeys(("requests_per_minute", "tokens_per_day", "concurrency", "burst"), 0),
    }
    assert (await world.gateway.http.post("/admin/limit", headers=ADMIN, json=body)).status_code == 200
    refused = await world.stranger.chat()
    assert (refused.status_code, refused.headers["x-should-retry"]) == (429, "false")


# Sentences.


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"key_name": 5}, "`key_name` must be a string."),
        ({}, "`key_name` is missing."),
        ({"key_name": "a", "max_requests": "many"}, "`max_requests` must be a whole number."),
        ({"key_name": "a", "max_requests": 0}, "`max_requests` must be greater than 0."),
        (
            {"key_name": "a", "environment_tag": "moon"},
            "`environment_tag` must be 'live', 'test', 'staging' or 'development'.",
        ),
        ({"key_name": "a", "revealable": "perhaps"}, "`revealable` must be true or false."),
        ({"key_name": "a", "ip_allowlist": "x"}, "`ip_allowlist` must be a list."),
        (
            {"key_name": "a", "ip_allowlist": ["x"]},
            "`ip_allowlist.0` must be an address or a network such as 203.0.113.0/24.",
        ),
        ({"key_name": "a", "misspelt": 1}, "`misspelt` is not a known field; check its spelling."),
        (
            {"key_name": "a", "budget": 1},
            "`budget_window` is missing: budget and budget_window belong together.",
        ),
        ({"key_name": "a" * 101}, "`key_name` must have at most 100 characters."),
        ({"key_name": "a\n"}, "`key_name` is fine without its line end"),
    ],
    ids=str,
)
async def test_what_is_wrong_is_said_in_a_sentence_that_names_the_field(
    world: World, order: dict[str, Any], message: str
) -> None:
    response = await world.gateway.http.post("/user/api-keys", headers=world.user.headers, json=order)
    if order.get("key_name") == "a\n":
        assert response.json()["key_name"] == "a"
    else:
        assert (response.status_code, response.json()["error"]["message"]) == (400, message)


async def test_every_pattern_of_the_models_has_a_sentence(schema: dict[str, Any]) -> None:
    patterns: set[str] = set()

    def walk(part: Any, name: str = "") -> None:
        if isinstance(part, dict):
            if isinstance(part.get("pattern"), str) and "$" in part["pattern"]:
                patterns.add(part["pattern"])
            for key, each in part.items():
                walk(each, key)
        elif isinstance(part, list):
            for each in part:
                walk(each, name)

    walk(schema)
    decimals = {
        pattern for pattern in patterns if "\\d" in pattern
    }  # of amounts, which are checked as numbers
    assert patterns - decimals == set(PATTERNS)


async def test_no_sentence_speaks_the_library_s_language(world: World, schema: dict[str, Any]) -> None:
    spoken = set()
    for endpoint in (*WITH_BODY, REGISTER):
        assert endpoint.body is not None
        for name, part in body_schema(schema, endpoint)["properties"].items():
            for path, value in wrong(schema, part, (name,)):
                response = await send(
                    world, endpoint, json.dumps(placed(endpoint.body(world), path, value)).encode()
                )
                spoken.add(response.json()["error"]["message"])
    assert [
        text
        for text in spoken
        if "nput should" in text or "tring should" in text or "alue error" in text or "valid " in text
    ] == []
    assert all(text.startswith("`") and text.endswith(".") for text in spoken)


async def test_every_public_path_was_looked_at() -> None:
    assert {each.path for each in PUBLIC if each.method == "POST"} == {REGISTER.path}
