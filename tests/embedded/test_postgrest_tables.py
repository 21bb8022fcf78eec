"""Tables are read and changed as PostgREST does it, and what is not imitated is refused by name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from postgrest.exceptions import APIError
from supabase import AsyncClient

CY = 'Cy, "the" (third)'


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ({"age": "eq.30"}, ["Ann"]),
        ({"age": "not.eq.30"}, [CY]),
        ({"age": "gte.30"}, ["Ann", CY]),
        ({"age": "is.null"}, ["Bob"]),
        ({"age": "is.not_null"}, ["Ann", CY]),
        ({"age": "isdistinct.30"}, ["Bob", CY]),
        ({"age": "eq(any).{30,50}"}, ["Ann", CY]),
        ({"age": "in.(30,50)"}, ["Ann", CY]),
        ({"age": "in.()"}, []),
        ({"name": 'in.("Cy, \\"the\\" (third)",Bob)'}, ["Bob", CY]),
        ({"name": "like.*n*"}, ["Ann"]),
        ({"name": "ilike.b%"}, ["Bob"]),
        ({"name": "like(any).{A*,B*}"}, ["Ann", "Bob"]),
        ({"name": "match.^[AB]"}, ["Ann", "Bob"]),
        ({"name": "fts.ann"}, ["Ann"]),
        ({"name": "wfts(english).bob"}, ["Bob"]),
        ({"code": "eq.AN"}, ["Ann"]),
        ({"feels": "eq.angry"}, ["Bob"]),
        ({"feels": "in.(calm,angry)"}, ["Ann", "Bob"]),
        ({"born": "lt.2001-02-04"}, ["Ann"]),
        ({"tags": "cs.{y}"}, ["Ann", "Bob"]),
        ({"tags": "cd.{y,z}"}, ["Bob", CY]),
        ({"tags": "ov.{x,z}"}, ["Ann"]),
        ({"tags": "eq.{}"}, [CY]),
        ({"data": 'cs.{"list": [2]}'}, ["Ann"]),
        ({"data->city->>zip": "eq.20"}, ["Bob"]),
        ({"data->list->1": "eq.2"}, ["Ann"]),
        ({"or": "(age.eq.30,name.eq.Bob)"}, ["Ann", "Bob"]),
        ({"or": "( age.eq.30 , and( name.like.C*, not.or(id.lt.2, feels.is.not_null)) )"}, ["Ann", CY]),
        ({"and": "(id.in.(1,3),tags.cs.{x})"}, ["Ann"]),
        ({"not.and": "(age.eq.30,feels.eq.calm)"}, ["Bob", CY]),
        ({"or": '(name.eq."Cy, \\"the\\" (third)",name.in.(Bob))'}, ["Bob", CY]),
        ({"or": "(data->city->>zip.eq.10,tags.not.cs.{y})"}, ["Ann", CY]),
        ({"name": "eq.'; drop table people; --"}, []),
    ],
)
async def test_filters_choose_rows(
    http: httpx.AsyncClient, parameters: dict[str, str], names: list[str]
) -> None:
    response = await http.get("/people", params={**parameters, "select": "name", "order": "id"})
    assert response.status_code == 200, response.text
    assert [row["name"] for row in response.json()] == names


@pytest.mark.parametrize(
    ("select", "row"),
    [
        ("id,name", {"id": 1, "name": "Ann"}),
        ("who:name,years:age::text", {"who": "Ann", "years": "30"}),
        ("data->city->>zip", {"zip": "10"}),
        ("first:data->list->0", {"first": 1}),
        ("data->list->0", {"list": 1}),
        ('"name"', {"name": "Ann"}),
        ("tags->0", {"tags": "x"}),
        ("born", {"born": "2001-02-03T04:05:06+00:00"}),
    ],
)
async def test_select_chooses_columns(http: httpx.AsyncClient, select: str, row: dict[str, Any]) -> None:
    response = await http.get("/people", params={"select": select, "id": "eq.1"})
    assert response.json() == [row]


async def test_rows_come_in_the_order_that_was_asked(http: httpx.AsyncClient) -> None:
    for order, ids in [
        ("age.desc", [2, 3, 1]),
        ("age.desc.nullslast", [3, 1, 2]),
        ("age.nullsfirst,id", [2, 1, 3]),
    ]:
        response = await http.get("/people", params={"select": "id", "order": order})
        assert [row["id"] for row in response.json()] == ids


async def test_a_page_says_where_it_is(http: httpx.AsyncClient) -> None:
    counted = {"prefer": "count=exact"}
    first = await http.get("/numbers?order=n&limit=2", headers=counted)
    assert (first.status_code, first.headers["content-range"]) == (206, "0-1/1200")
    uncounted = await http.get("/numbers?order=n&limit=2&offset=4")
    assert (uncounted.status_code, uncounted.headers["content-range"]) == (200, "4-5/*")
    ranged = await http.get("/numbers?order=n", headers={**counted, "range": "10-11"})
    assert ([row["n"] for row in ranged.json()], ranged.headers["content-range"]) == ([11, 12], "10-11/1200")
    beyond = await http.get("/numbers?offset=5000", headers=counted)
    assert (beyond.status_code, beyond.json()["code"]) == (416, "PGRST103")
    negative = await http.get("/numbers?limit=-1")
    assert (negative.status_code, negative.json()["code"]) == (416, "PGRST103")


async def test_no_answer_holds_more_rows_than_a_hosted_project_gives(client: AsyncClient) -> None:
    answer = await client.table("numbers").select("*", count="exact").limit(5000).execute()
    assert (len(answer.data), answer.count) == (1000, 1200)


async def test_head_counts_without_a_body(client: AsyncClient) -> None:
    answer = await client.table("people").select("*", count="exact", head=True).execute()
    assert (answer.data, answer.count) == ([], 3)


async def test_single_wants_exactly_one_row(client: AsyncClient) -> None:
    one = await client.table("people").select("name").eq("id", 1).single().execute()
    assert one.data == {"name": "Ann"}
    assert await client.table("people").select("name").eq("id", 99).maybe_single().execute() is None
    with pytest.raises(APIError) as refused:
        await client.table("people").select("name").single().execute()
    assert (refused.value.code, refused.value.details) == ("PGRST116", "The result contains 3 rows")


async def test_nulls_can_be_stripped(client: AsyncClient) -> None:
    answer = await client.table("people").select("age", "feels").eq("id", 3).strip_nulls().execute()
    assert answer.data == [{"age": 50}]


async def test_rows_are_inserted_with_nulls_or_defaults_for_what_is_missing(client: AsyncClient) -> None:
    rows = [
        {"name": "Di", "data": {"a": [1]}, "tags": ["p,q", "r"]},
        {"name": "Ed", "data": {}, "tags": [], "age": 1},
    ]
    nulls = await client.table("people").insert(rows).execute()
    assert [row["age"] for row in nulls.data] == [None, 1]
    assert (nulls.data[0]["data"], nulls.data[0]["tags"]) == ({"a": [1]}, ["p,q", "r"])
    more = [{"name": "Flo"}, {"name": "Gus", "age": 5}]
    defaults = await client.table("people").insert(more, default_to_null=False).execute()
    assert [(row["age"], row["tags"]) for row in defaults.data] == [(18, []), (5, [])]
    assert defaults.data[0]["id"] is not None


async def test_empty_inserts_insert_defaults_or_nothing(http: httpx.AsyncClient) -> None:
    wanted = {"prefer": "return=representation"}
    nothing = await http.post("/journal", content="[]", headers=wanted)
    assert (nothing.status_code, nothing.json()) == (201, [])
    default = await http.post("/journal", content="{}", headers=wanted)
    assert (default.status_code, default.json()) == (201, [{"note": None}])


async def test_an_insert_answers_minimally_unless_asked(http: httpx.AsyncClient) -> None:
    response = await http.post("/journal", json={"note": "x"})
    assert (response.status_code, response.text, response.headers["content-range"]) == (201, "", "*/*")


async def test_a_value_too_long_for_its_column_is_refused_and_not_cut(client: AsyncClient) -> None:
    with pytest.raises(APIError) as refused:
        await client.table("people").insert({"name": "Hal", "code": "TOOLONG"}).execute()
    assert refused.value.code == "22001"


async def test_a_conflict_is_refused_merged_or_ignored_as_asked(client: AsyncClient) -> None:
    with pytest.raises(APIError) as refused:
        await client.table("people").insert({"name": "Ann"}).execute()
    assert refused.value.code == "23505"
    merged = await client.table("people").upsert({"name": "Ann", "age": 31}, on_conflict="name").execute()
    assert [(row["id"], row["age"], row["code"]) for row in merged.data] == [(1, 31, "AN ")]
    by_key = await client.table("people").upsert({"id": 2, "name": "Rob"}).execute()
    assert [row["feels"] for row in by_key.data] == ["angry"]
    ignored = await client.table("people").upsert({"id": 2, "name": "X"}, ignore_duplicates=True).execute()
    assert ignored.data == []


async def test_an_update_changes_the_chosen_rows(client: AsyncClient, http: httpx.AsyncClient) -> None:
    changed = (
        await client.table("people")
        .update({"age": 1, "data": {"k": None}}, count="exact")
        .in_("id", [1, 2])
        .execute()
    )
    assert ([row["data"] for row in changed.data], changed.count) == ([{"k": None}] * 2, 2)
    minimal = await http.patch("/people?id=eq.1", json={"age": None})
    assert (minimal.status_code, minimal.headers["content-range"]) == (204, "0-0/*")
    nothing = await http.patch("/people?id=eq.99", json={"age": 1})
    assert (nothing.status_code, nothing.headers["content-range"]) == (204, "*/*")
    empty = await http.patch("/people?id=eq.1", json={}, headers={"prefer": "return=representation"})
    assert (empty.status_code, empty.json()) == (200, [])


async def test_a_delete_removes_the_chosen_rows(client: AsyncClient, owner: Any) -> None:
    gone = await client.table("people").delete().like("name", "A%").execute()
    assert [row["name"] for row in gone.data] == ["Ann"]
    assert await owner.fetchval("select count(*) from people") == 2


async def test_a_change_without_a_filter_is_refused_as_on_a_hosted_project(client: AsyncClient) -> None:
    for change in (client.table("people").delete(), client.table("people").update({"age": 1})):
        with pytest.raises(APIError) as refused:
            await change.execute()
        assert refused.value.code == "21000"


async def test_a_change_of_too_many_rows_is_undone(
    client: AsyncClient, http: httpx.AsyncClient, owner: Any
) -> None:
    with pytest.raises(APIError) as refused:
        await client.table("people").delete().gt("id", 0).max_affected(2).execute()
    assert refused.value.code == "PGRST124"
    single = {"accept": "application/vnd.pgrst.object+json"}
    assert (await http.delete("/people?id=gt.0", headers=single)).status_code == 406
    assert await owner.fetchval("select count(*) from people") == 3


async def test_names_with_quotes_are_only_names(http: httpx.AsyncClient) -> None:
    wanted = {"prefer": "return=representation"}
    row = {"a b": 1, 'c"d': "x"}
    assert (await http.post('/odd "names"', json=row, headers=wanted)).json() == [row]
    response = await http.get(
        '/odd "names"', params={"select": '"a b",z:"c\\"d"', '"a b"': "eq.1", "order": '"a b".desc'}
    )
    assert response.json() == [{"a b": 1, "z": "x"}]


@pytest.mark.parametrize(
    ("parameters", "status", "code"),
    [
        ({"nothing": "eq.1"}, 400, "42703"),
        ({"select": "nothing"}, 400, "42703"),
        ({"order": "nothing"}, 400, "42703"),
        ({"id": "eq.x"}, 400, "22P02"),
        ({"id": "near.1"}, 400, "PGRST100"),
        ({"id": "1"}, 400, "PGRST100"),
        ({"or": "(id.eq.1"}, 400, "PGRST100"),
        ({"or": "(id.eq.1)) or (1.eq.1"}, 400, "PGRST100"),
        ({"id": "in.(1"}, 400, "PGRST100"),
        ({"limit": "1; drop table people"}, 400, "PGRST100"),
        ({"order": "id; drop table people"}, 400, "42703"),
        ({"order": "id.desc; drop table people"}, 400, "PGRST100"),
        ({"select": "id::int); drop table people"}, 400, "PGRST100"),
        ({"select": "id::int;drop table people"}, 400, "PGRST100"),
        ({'id" = 1 or "id': "eq.1"}, 501, "PGRST501"),
        ({"select": "id,friends(name)"}, 501, "PGRST501"),
        ({"select": "count()"}, 501, "PGRST501"),
        ({"friends.name": "eq.x"}, 501, "PGRST501"),
        ({"friends.order": "name"}, 501, "PGRST501"),
        ({"order": "friends(name)"}, 501, "PGRST501"),
    ],
)
async def test_a_query_that_cannot_be_read_is_refused(
    http: httpx.AsyncClient, parameters: dict[str, str], status: int, code: str
) -> None:
    response = await http.get("/people", params=parameters)
    assert (response.status_code, response.json()["code"]) == (status, code)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("GET", "/nowhere", {}, 404, "PGRST205"),
        ("GET", "/people", {"accept": "text/csv"}, 501, "PGRST501"),
        ("GET", "/people", {"accept": "application/vnd.pgrst.plan+json"}, 501, "PGRST501"),
        ("GET", "/people", {"prefer": "count=planned"}, 501, "PGRST501"),
        ("GET", "/people", {"accept-profile": "auth"}, 406, "PGRST106"),
        ("PUT", "/people?id=eq.1", {}, 501, "PGRST501"),
        ("POST", "/people", {"content-type": "text/csv"}, 501, "PGRST501"),
        ("POST", "/people", {}, 400, "PGRST102"),
    ],
)
async def test_what_is_not_imitated_is_refused_by_name(
    http: httpx.AsyncClient, method: str, path: str, headers: dict[str, str], status: int, code: str
) -> None:
    response = await http.request(method, path, headers=headers)
    assert (response.status_code, response.json()["code"]) == (status, code)


async def test_an_unknown_column_in_a_body_is_refused(client: AsyncClient) -> None:
    with pytest.raises(APIError) as refused:
        await client.table("people").insert({"name": "x", "nothing": 1}).execute()
    assert refused.value.code == "PGRST204"
