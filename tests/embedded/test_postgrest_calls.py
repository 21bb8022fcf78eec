"""Functions are called as PostgREST calls them, in one round trip."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from postgrest.exceptions import APIError
from supabase import AsyncClient

from embedded.postgres import EmbeddedPostgres
from embedded.postgrest import PostgrestTransport


@pytest.mark.parametrize(
    ("name", "arguments", "status", "body"),
    [
        ("answer_nothing", "{}", 204, ""),
        ("answer_number", "{}", 200, "42"),
        ("answer_number", "", 200, "42"),
        ("answer_null", "{}", 200, "null"),
        ("add", '{"p_a": 1, "p_b": 2}', 200, "3"),
        ("add", '{"p_a": 1}', 200, "11"),
        ("join_all", '{"p_words": ["a", "b"], "p_date": "2026-01-02"}', 200, '"a-b2026-01-02"'),
        ("count_up", '{"p_to": 3}', 200, "[1, 2, 3]"),
        ("count_up", '{"p_to": 0}', 200, "[]"),
        ("squares", '{"p_to": 2}', 200, '[{"n":1,"squared":1}, \n {"n":2,"squared":4}]'),
        ("one_out", "{}", 200, '{"total":7}'),
        ("two_out", "{}", 200, '{"a":1,"b":"x"}'),
        (
            "echo",
            '{"p_items": {"n": 12345678901234567890.123456789}}',
            200,
            '{"n": 12345678901234567890.123456789}',
        ),
        ("echo", '{"p_items": null}', 200, "null"),
        ("whole_body", "[1, 2]", 200, "[1, 2]"),
        ("whole_body", '{"a": 1}', 200, '{"a": 1}'),
        ("overloaded", '{"p_a": 1}', 200, '"one"'),
        ("overloaded", '{"p_a": 1, "p_b": 1}', 200, '"two"'),
    ],
)
async def test_a_result_has_the_shape_that_postgrest_gives_it(
    http: httpx.AsyncClient, name: str, arguments: str, status: int, body: str
) -> None:
    response = await http.post(f"/rpc/{name}", content=arguments)
    assert (response.status_code, response.text) == (status, body)


async def test_a_row_of_a_table_is_answered_as_an_object(client: AsyncClient) -> None:
    answer = await client.rpc("one_person", {"p_name": "Ann"}).execute()
    assert isinstance(answer.data, dict)
    assert (answer.data["name"], answer.data["code"]) == ("Ann", "AN ")


async def test_rows_of_a_function_can_be_selected_filtered_ordered_and_counted(client: AsyncClient) -> None:
    answer = (
        await client.rpc("all_people", {})
        .select("name")
        .gt("age", 20)
        .order("age", desc=True)
        .limit(1)
        .execute()
    )
    assert answer.data == [{"name": 'Cy, "the" (third)'}]
    counted = await client.rpc("count_up", {"p_to": 5}, get=True, count="exact").limit(2).execute()
    assert (counted.data, counted.count) == ([1, 2], 5)


async def test_get_passes_arguments_in_the_query_and_cannot_write(client: AsyncClient, owner: Any) -> None:
    assert (await client.rpc("add", {"p_a": "4"}, get=True).execute()).data == 14
    with pytest.raises(APIError) as refused:
        await client.rpc("write_note", {"p_note": "x"}, get=True).execute()
    assert refused.value.code == "25006"
    assert await owner.fetchval("select count(*) from journal") == 0


async def test_calls_act_as_service_role_within_the_statement_timeout_of_a_hosted_project(
    client: AsyncClient,
) -> None:
    answer = await client.rpc("who_am_i", {}).execute()
    assert answer.data == {"role": "service_role", "login": "authenticator", "timeout": "8s"}


async def test_a_slow_statement_is_cut_off(server: EmbeddedPostgres, owner: Any) -> None:
    quick = PostgrestTransport(server.connect_kwargs("authenticator"), statement_timeout_ms=50)
    async with httpx.AsyncClient(transport=quick) as http:
        response = await http.post("http://x.invalid/rest/v1/rpc/sleep", json={"p_seconds": 30})
    assert (response.status_code, response.json()["code"]) == (500, "57014")


async def test_the_clients_own_timeout_is_a_read_timeout(http: httpx.AsyncClient) -> None:
    with pytest.raises(httpx.ReadTimeout):
        await http.post("/rpc/sleep", json={"p_seconds": 30}, timeout=httpx.Timeout(5, read=0.05))
    assert (await http.post("/rpc/answer_number")).text == "42"


@pytest.mark.parametrize(
    ("sqlstate", "status"),
    [
        ("P0001", 400),
        ("23505", 409),
        ("23503", 409),
        ("42501", 403),
        ("40001", 500),
        ("53300", 503),
        ("PT402", 402),
        ("22023", 400),
        ("42883", 404),
        ("28000", 403),
    ],
)
async def test_an_error_of_a_function_keeps_its_code_and_gets_postgrests_status(
    http: httpx.AsyncClient, sqlstate: str, status: int
) -> None:
    response = await http.post("/rpc/fail", json={"p_code": sqlstate})
    assert response.status_code == status
    assert response.json() == {"code": sqlstate, "message": "no", "details": "a detail", "hint": "a hint"}


@pytest.mark.parametrize(
    ("name", "body", "status", "code"),
    [
        ("nowhere", "{}", 404, "PGRST202"),
        ("add", "{}", 404, "PGRST202"),
        ("add", '{"p_a": 1, "p_c": 2}', 404, "PGRST202"),
        ("add", "[1]", 404, "PGRST202"),
        ("add", "{", 400, "PGRST102"),
        ("add", '{"p_a": "x"}', 400, "22P02"),
        ('add"(1); drop table people; --', "{}", 404, "PGRST202"),
    ],
)
async def test_a_call_that_fits_no_function_is_refused(
    http: httpx.AsyncClient, name: str, body: str, status: int, code: str
) -> None:
    response = await http.post(f"/rpc/{name}", content=body)
    assert (response.status_code, response.json()["code"]) == (status, code)


async def test_a_function_is_found_when_a_migration_adds_or_changes_it(
    client: AsyncClient, owner: Any
) -> None:
    assert (await client.rpc("answer_number", {}).execute()).data == 42
    await owner.execute("create function late(p_a int) returns int language sql as 'select 1'")
    try:
        assert (await client.rpc("late", {"p_a": 1}).execute()).data == 1
        await owner.execute(
            "drop function late; create function late(p_a text) returns text language sql as 'select $1'"
        )
        assert (await client.rpc("late", {"p_a": "new"}).execute()).data == "new"
    finally:
        await owner.execute("drop function late")


async def test_calls_share_a_small_pool(server: EmbeddedPostgres, owner: Any) -> None:
    small = PostgrestTransport(server.connect_kwargs("authenticator"), pool_size=2)
    async with httpx.AsyncClient(transport=small, base_url="http://x.invalid/rest/v1") as http:
        answers = await asyncio.gather(*(http.post("/rpc/add", json={"p_a": i}) for i in range(50)))
    assert [answer.json() for answer in answers] == [i + 10 for i in range(50)]


async def test_a_cancelled_call_leaves_the_pool_usable(server: EmbeddedPostgres, owner: Any) -> None:
    single = PostgrestTransport(server.connect_kwargs("authenticator"), pool_size=1)
    async with httpx.AsyncClient(transport=single, base_url="http://x.invalid/rest/v1") as http:
        await http.post("/rpc/answer_number")
        call = asyncio.create_task(http.post("/rpc/sleep", json={"p_seconds": 30}))
        while not await owner.fetchval("select count(*) from pg_stat_activity where wait_event = 'PgSleep'"):  # noqa: ASYNC110
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (await http.post("/rpc/answer_number")).text == "42"
