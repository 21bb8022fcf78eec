"""Whole lists are streamed page by page, stop when the client leaves, and never look complete when they are
not.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from routes.http.export import PAGE, cell, csv_lines
from tests.support.database import Database
from tests.support.database_link import DatabaseLink, database_link
from tests.support.gateway import ADMIN_KEY, Gateway, User

Start = Callable[..., Awaitable[Gateway]]
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
MANY = 12 * PAGE + 7

# Settled records, two to a moment so that a page may end between two of the same time; ids and times grow
# together.
RECORDS = """
insert into public.usage_records (request_id, user_id, key_id, mode, environment, endpoint, model,
hold_nanos, markup, status,
                                  settlement_source, created_at, expires_at, settled_at)
select (lpad(to_hex((extract(epoch from t) * 1000)::bigint), 12, '0') || '7' || lpad(to_hex(n % 4096), 3, '0')
        || '8' || lpad(to_hex(k.user_id), 3, '0')
        || lpad(to_hex(n), 12, '0'))::uuid, k.user_id, k.id, 'sandbox', 'live', 'chat/completions',
       case n % 3 when 0 then '=1+1' else 'openai/gpt-4o-mini' end, 1, 1, 'completed', 'usage', t, t, t
from public.api_keys_new k, generate_series(1, $2::int) as n, lateral (
    select date_trunc('day', now(), 'UTC') - interval '10 days' + make_interval(secs => n / 2) as t) as at
where k.user_id = $1
"""


async def fill(user: User, count: int = MANY) -> None:
    await user.gateway.database.value(RECORDS, user.id, count)


async def text(user: User, path: str) -> httpx.Response:
    response = await user.gateway.http.get(path, headers=user.headers)
    assert response.status_code == 200, response.text
    return response


def rows_of(response: httpx.Response) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(response.content.decode(), newline="")))


async def test_every_record_is_exported_once_in_every_form(gateway: Gateway) -> None:
    user, other = await gateway.register(), await gateway.register()
    await fill(user)
    await fill(other, 3)
    lines = [
        json.loads(line) for line in (await text(user, "/user/usage/records?format=jsonl")).text.splitlines()
    ]
    table = rows_of(await text(user, "/user/usage/records?format=csv"))
    ids = [row["request_id"] for row in await gateway.database.rows(
        "select request_id::text from public.usage_records where user_id = $1 "
        "order by created_at desc, request_id desc", user.id
    )]  # fmt: skip
    assert len(ids) == MANY
    assert [line["request_id"] for line in lines] == ids
    assert [row["request_id"] for row in table] == ids
    page = (await text(user, "/user/usage/records?limit=5")).json()["records"]
    assert lines[:5] == page
    assert list(table[0]) == list(page[0])


async def test_a_range_bounds_an_export_and_a_page_alike(gateway: Gateway) -> None:
    user = await gateway.register()
    await fill(user, 600)
    first, last = await gateway.database.value(
        "select array[min(created_at), max(created_at)] from public.usage_records"
    )
    start, end = first.isoformat().replace("+00:00", "Z"), last.isoformat().replace("+00:00", "Z")
    for path, headers in (("/user/usage/records", user.headers), ("/admin/usage/records", ADMIN)):
        for times in (f"start={start}&end={end}", f"start={end}", f"end={start}"):
            expected = {f"start={start}&end={end}": 599, f"start={end}": 1, f"end={start}": 0}[times]
            lines = (
                await gateway.http.get(f"{path}?format=jsonl&{times}", headers=headers)
            ).text.splitlines()
            page = (await gateway.http.get(f"{path}?limit=1000&{times}", headers=headers)).json()["records"]
            assert (len(lines), len(page)) == (expected, expected), (path, times)


async def test_an_export_of_everybody_s_says_whose_each_row_is(gateway: Gateway) -> None:
    one, two = await gateway.register(), await gateway.register(credits=2)
    await fill(one, 400)
    await fill(two, 300)
    everybody = rows_of(await gateway.http.get("/admin/usage/records?format=csv", headers=ADMIN))
    assert len(everybody) == 700 and {row["user_id"] for row in everybody} == {str(one.id), str(two.id)}
    assert (
        len(
            rows_of(
                await gateway.http.get(f"/admin/usage/records?format=csv&user_id={two.id}", headers=ADMIN)
            )
        )
        == 300
    )
    seen, cursor = [], ""
    while cursor is not None:
        page = await gateway.admin("GET", f"/admin/usage/records?limit=300{cursor and '&cursor=' + cursor}")
        seen += [record["request_id"] for record in page["records"]]
        cursor = page["next_cursor"]
    assert seen == [row["request_id"] for row in everybody]
    grants = rows_of(await gateway.http.get("/admin/transactions?format=csv", headers=ADMIN))
    assert [(row["user_id"], row["actor"], row["amount"]) for row in grants] == [
        (str(two.id), "admin", "2"), (str(two.id), "gateway", "10"), (str(one.id), "gateway", "10"),
    ]  # fmt: skip
    assert [row["amount"] for row in rows_of(await text(two, "/user/transactions?format=csv"))] == ["2", "10"]
    assert len((await gateway.admin("GET", f"/admin/transactions?user_id={one.id}"))["transactions"]) == 1


async def test_the_audit_log_is_exported_with_its_details(gateway: Gateway) -> None:
    user = await gateway.register(credits=2)
    rows = rows_of(
        await gateway.http.get(
            f"/admin/audit-logs?format=csv&user_id={user.id}&action=add_credits", headers=ADMIN
        )
    )
    assert [json.loads(row["details"])["amount_nanos"] for row in rows] == [2_000_000_000]
    own = [
        json.loads(line)
        for line in (await text(user, "/user/api-keys/audit-logs?format=jsonl")).text.splitlines()
    ]
    assert [entry["action"] for entry in own] == ["set_limits", "add_credits", "create"]


@pytest.mark.parametrize(
    ("form", "kind"), [("csv", "text/csv; charset=utf-8"), ("jsonl", "application/x-ndjson")]
)
async def test_an_export_is_a_file_with_a_name_and_nobody_keeps_it(
    gateway: Gateway, form: str, kind: str
) -> None:
    user = await gateway.register()
    answer = await text(user, f"/user/usage/records?format={form}")
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-disposition"].startswith('attachment; filename="usage-records-2')
    assert answer.headers["content-disposition"].endswith(f'.{form}"')
    assert answer.headers["cache-control"] == "no-store"
    assert len(answer.text.splitlines()) == (1 if form == "csv" else 0)


async def test_a_limit_bounds_an_export_and_a_cursor_begins_it(gateway: Gateway) -> None:
    user = await gateway.register()
    await fill(user, 700)
    page = (await text(user, "/user/usage/records?limit=100")).json()
    rest = (
        await text(user, f"/user/usage/records?format=jsonl&limit=550&cursor={page['next_cursor']}")
    ).text.splitlines()
    assert len(rest) == 550
    assert not {json.loads(line)["request_id"] for line in rest} & {
        record["request_id"] for record in page["records"]
    }


async def test_formulas_in_an_export_are_defused(gateway: Gateway) -> None:
    user = await gateway.register()
    await fill(user, 3)
    assert {row["model"] for row in rows_of(await text(user, "/user/usage/records?format=csv"))} == {
        "'=1+1",
        "openai/gpt-4o-mini",
    }


@pytest.mark.parametrize(
    "value",
    [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "  =1+1",
        "\uff1d1+1",
        "-",
        "=cmd|' /C calc'!A0",
    ],
)
def test_a_text_that_a_spreadsheet_would_run_is_quoted(value: str) -> None:
    assert cell(value) == f"'{value}"


def test_what_no_spreadsheet_runs_is_left_alone() -> None:
    assert [cell(v) for v in ("a=1", "openai/gpt-4o", "", None, True, -1, 1.5, {"a": [1]})] == [
        "a=1", "openai/gpt-4o", "", "", "true", "-1", "1.5", '{"a":[1]}',
    ]  # fmt: skip


def test_quotes_commas_and_line_ends_survive_the_way_into_csv_and_back() -> None:
    row = ['a"b', "c,d", "e\nf", "ü"]
    assert next(csv.reader(io.StringIO(csv_lines([row]).decode(), newline=""))) == row


# Backpressure, leaving, and errors in mid-stream: the application itself, with a client whose every step is
# ours.


@pytest.fixture
async def link(database: Database) -> AsyncIterator[DatabaseLink]:
    async with database_link(database) as opened:
        yield opened


class Reader:
    """A client that takes what is sent only when the test says so."""

    def __init__(self, app: Any, user: User, path: str) -> None:
        self._app, self._user, self._path = app, user, path
        self._asked = False
        self.messages: list[dict[str, Any]] = []
        self.may_send, self.left, self.arrived = asyncio.Event(), asyncio.Event(), asyncio.Condition()

    async def run(self) -> None:
        path, _, query = self._path.partition("?")
        headers = [(name.encode(), value.encode()) for name, value in self._user.headers.items()]
        await self._app(
            {
                "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
                "method": "GET", "path": path, "raw_path": path.encode(), "query_string": query.encode(),
                "root_path": "", "headers": headers, "scheme": "http",
                "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
            },
            self._receive, self._send,
        )  # fmt: skip

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        async with self.arrived:
            self.messages.append(message)
            self.arrived.notify_all()
        if len(self.messages) > 2:
            await self.may_send.wait()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10), self.arrived:
            await self.arrived.wait_for(lambda: len(self.messages) >= count)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


async def reader_of(start_gateway: Start, link: DatabaseLink, form: str) -> tuple[Reader, asyncio.Task[None]]:
    """A client that has the head and the beginning of an export of many pages, and takes no more for now."""
    gateway = await start_gateway(database_url=link.url)
    user = await gateway.register()
    await fill(user)
    reader = Reader(gateway.app, user, f"/user/usage/records?format={form}")
    running = asyncio.create_task(reader.run())
    await reader.until(3)
    return reader, running


async def test_no_page_is_fetched_before_the_one_before_it_is_taken(
    start_gateway: Start, link: DatabaseLink
) -> None:
    reader, running = await reader_of(start_gateway, link, "csv")
    before = link.round_trips
    await link.database.value("select pg_sleep(0.05)")  # time enough for a page that nobody waits for
    assert link.round_trips == before
    reader.may_send.set()
    await asyncio.wait_for(running, 10)
    assert link.round_trips - before >= MANY // PAGE - 2
    assert reader.messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert len(reader.body.splitlines()) == MANY + 1


async def test_a_client_that_leaves_ends_its_export(start_gateway: Start, link: DatabaseLink) -> None:
    reader, running = await reader_of(start_gateway, link, "jsonl")
    before = link.round_trips
    reader.left.set()
    await asyncio.wait_for(running, 10)
    assert link.round_trips == before
    assert len(reader.body.splitlines()) <= 2 * PAGE


async def test_csv_that_breaks_off_says_so_in_its_last_line(start_gateway: Start, link: DatabaseLink) -> None:
    reader, running = await reader_of(start_gateway, link, "csv")
    link.cut()
    reader.may_send.set()
    await asyncio.wait_for(running, 10)
    assert reader.messages[-1]["more_body"] is False
    *_, last = reader.body.decode().splitlines()
    assert "INCOMPLETE: this export broke off here." in last and "database does not respond" in last
    link.mend()


async def test_json_lines_that_break_off_have_no_end(start_gateway: Start, link: DatabaseLink) -> None:
    reader, running = await reader_of(start_gateway, link, "jsonl")
    link.cut()
    reader.may_send.set()
    await asyncio.wait_for(running, 10)
    assert reader.messages[-1]["more_body"] is True
    assert json.loads(reader.body.splitlines()[-1])["error"]["code"] == "database_unavailable"
    link.mend()


async def test_a_client_notices_json_lines_that_break_off(start_gateway: Start, link: DatabaseLink) -> None:
    gateway = await start_gateway(database_url=link.url)
    user = await gateway.register()
    await fill(user, 40_000)  # more than the sockets between here and there hold
    async with gateway.http.stream(
        "GET", "/user/usage/records?format=jsonl", headers=user.headers
    ) as response:
        chunks = response.aiter_bytes()
        await anext(chunks)
        link.cut()
        with pytest.raises(httpx.RemoteProtocolError):
            _ = [chunk async for chunk in chunks]
    link.mend()


async def test_an_export_without_a_database_is_an_ordinary_error(
    start_gateway: Start, link: DatabaseLink
) -> None:
    gateway = await start_gateway(database_url=link.url)
    user = await gateway.register()
    link.cut()
    response = await gateway.http.get("/user/usage/records?format=csv", headers=user.headers)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "database_unavailable")
    link.mend()


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("format=xml", "format"),
        ("start=2026-02-01T00:00:00Z&end=2026-01-01T00:00:00Z", "end"),
        ("start=soon", "start"),
        ("cursor=%00", "cursor"),
    ],
)
async def test_an_export_that_is_wrong_names_its_field(gateway: Gateway, query: str, param: str) -> None:
    user = await gateway.register()
    response = await gateway.http.get(f"/user/usage/records?format=csv&{query}", headers=user.headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
