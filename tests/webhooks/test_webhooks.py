"""Webhooks arrive signed, once at a time, at public addresses only, and are repeated until they do."""

from __future__ import annotations

import asyncio
import base64
import datetime
import ipaddress
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import orjson
import pytest

import db
from db_rows.accounts import DeliveryAttempt
from gateway.webhooks.deliveries import BATCH, RETRY_SECONDS, Deliveries
from gateway.webhooks.public_addresses import is_public, problem_of
from gateway.webhooks.sender import Sender
from tests.support import ROOT
from tests.support.database import Database
from tests.support.gateway import Gateway, User
from tests.support.receiver import HOST, Names, Receiver, verified
from tests.support.users import ask, scoped

URL = f"https://{HOST}/budgets"
ROUTES = [
    ("GET", "/user/webhooks", None),
    ("POST", "/user/webhooks", {"url": URL}),
    ("PUT", "/user/webhooks/1", {"is_active": False}),
    ("DELETE", "/user/webhooks/1", None),
    ("POST", "/user/webhooks/1/test", None),
    ("GET", "/user/webhooks/deliveries", None),
]

# A receiver: a TLS server on loopback, whose certificate the sender of these tests trusts. What decides which
# addresses may be reached is an argument of the sender, so that nothing in production could be told to reach
# loopback.


def status(code: int, *headers: str) -> bytes:
    return "\r\n".join((f"HTTP/1.1 {code} Status", *headers, "content-length: 0", "", "")).encode()


@asynccontextmanager
async def sending(make: Callable[..., Sender], **changes: Any) -> AsyncIterator[Sender]:
    sender = make(**changes)
    try:
        yield sender
    finally:
        await sender.aclose()


@dataclass
class Stage:
    """A user with a webhook at the receiver, and instances that deliver."""

    gateway: Gateway
    user: User
    receiver: Receiver
    make: Callable[..., Sender]
    webhook_id: int
    secret: str

    @property
    def database(self) -> Database:
        return self.gateway.database

    def instance(self) -> Deliveries:
        """An instance of the gateway, as far as it delivers."""
        runtime = self.gateway.app.state.service.runtime
        return Deliveries(
            lambda only: db.claim_deliveries(runtime.client, limit=BATCH, lease_seconds=90, delivery_id=only),
            lambda order: db.finish_delivery(runtime.client, order),
            decrypt=runtime.vault.decrypt,
            open_sender=self.make,
        )

    async def event(self, level: int = 80, **fields: Any) -> int:
        """What settlement writes when a level is reached; the id of the delivery."""
        row = {
            "key_id": None,
            "end_user": "customer-17",
            "window_start": datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC),
            **fields,
        }
        async with self.database.owner() as owner:
            event_id = await owner.fetchval(
                "insert into public.budget_events (user_id, key_id, end_user, level, budget_nanos, "
                "spent_nanos, budget_window, "
                "window_start, request_id) values ($1, $2, $3, $4, 5000000000, 4000000001, 'month', $5, "
                "'0199f0a0-0000-7000-8000-000000000000') returning id",
                self.user.id, row["key_id"], row["end_user"], level, row["window_start"],
            )  # fmt: skip
            return int(
                await owner.fetchval(
                    "insert into public.webhook_deliveries (event_id, webhook_id, user_id) "
                    "values ($1, $2, $3) returning id",
                    event_id,
                    self.webhook_id,
                    self.user.id,
                )
            )

    async def due_again(self) -> float:
        """Lets the time pass until the next attempt; returns how many seconds those were."""
        query = "select extract(epoch from next_attempt_at - now())::float from public.webhook_deliveries"
        seconds = float(await self.database.value(query))
        await self.database.value("update public.webhook_deliveries set next_attempt_at = now() returning id")
        return seconds

    async def delivery(self) -> dict[str, Any]:
        return dict((await ask(self.user, "GET", "/user/webhooks/deliveries")).json()["deliveries"][0])


@pytest.fixture
async def stage(gateway: Gateway, receiver: Receiver, trusting: Callable[..., Sender]) -> Stage:
    user = await gateway.register()
    made = (await ask(user, "POST", "/user/webhooks", {"url": receiver.url})).json()
    return Stage(gateway, user, receiver, trusting, made["webhook"]["id"], made["secret"])


# Managing them.


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
async def test_a_route_is_closed_without_its_scope(
    gateway: Gateway, method: str, path: str, body: Any
) -> None:
    user = await gateway.register()
    assert (await gateway.http.request(method, path, json=body)).status_code == 401
    other = await scoped(user, {"read": ["account", "budgets"], "write": ["account", "budgets"]})
    refused = await ask(other, method, path, body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")


@pytest.mark.parametrize(("method", "path", "body"), [route for route in ROUTES if route[0] != "GET"])
async def test_a_test_key_changes_nothing(gateway: Gateway, method: str, path: str, body: Any) -> None:
    user = await gateway.register(environment="test")
    assert (await ask(user, method, path, body)).status_code == 403


async def test_a_webhook_is_made_changed_and_deleted_by_its_owner(gateway: Gateway) -> None:
    user, other = await gateway.register(), await gateway.register()
    made = await ask(user, "POST", "/user/webhooks", {"url": URL})
    assert made.status_code == 201
    secret, webhook = made.json()["secret"], made.json()["webhook"]
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    listed = await ask(user, "GET", "/user/webhooks")
    assert listed.json()["webhooks"] == [webhook]
    assert secret not in listed.text
    assert secret not in str(await gateway.database.rows("select * from public.webhooks"))
    path = f"/user/webhooks/{webhook['id']}"
    for method, where, body in (
        ("PUT", path, {"is_active": False}),
        ("DELETE", path, None),
        ("POST", f"{path}/test", None),
    ):
        refused = await ask(other, method, where, body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "webhook_id")
    changed = (await ask(user, "PUT", path, {"url": URL + "/2", "is_active": False})).json()
    assert (changed["webhook"]["url"], changed["webhook"]["is_active"], changed["secret"]) == (
        URL + "/2",
        False,
        None,
    )
    assert (await ask(user, "POST", f"{path}/test")).status_code == 409
    assert (await ask(user, "DELETE", path)).status_code == 200
    assert (await ask(user, "DELETE", path)).status_code == 404
    dump = await gateway.database.value("select string_agg(a::text, '') from public.audit_logs a")
    assert "delete_webhook" in dump
    assert secret not in dump


async def test_a_replaced_key_in_its_grace_period_changes_no_webhook(gateway: Gateway) -> None:
    user = await gateway.register()
    (key,) = (await ask(user, "GET", "/user/api-keys")).json()["keys"]
    rotated = (await ask(user, "POST", f"/user/api-keys/{key['id']}/rotate", {"grace_period": 3600})).json()
    assert (await ask(user, "GET", "/user/webhooks")).status_code == 200
    for path, body in (
        ("/user/webhooks", {"url": URL}),
        ("/user/end-users", {"end_user": "a", "budget": 1, "budget_window": "day"}),
    ):
        refused = await ask(user, "POST", path, body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")
        assert (await ask(User(gateway, user.id, rotated["api_key"]), "POST", path, body)).status_code == 201


async def test_there_are_at_most_five(gateway: Gateway) -> None:
    user = await gateway.register()
    answers = await asyncio.gather(
        *(ask(user, "POST", "/user/webhooks", {"url": f"{URL}/{number}"}) for number in range(8))
    )
    assert sorted(answer.status_code for answer in answers) == [201] * 5 + [409] * 3


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/", "ftp://hooks.example.com/", "hooks.example.com", "https://",
        "https:///x", "", "https://user:pw@a.example.com/", "https://localhost/", "https://intranet/",
        "https://127.0.0.1/", "https://127.1/", "https://2130706433/", "https://0x7f.1/", "https://10.0.0.1/",
        "https://169.254.169.254/latest/", "https://[::1]/", "https://[::ffff:10.0.0.1]/",
        "https://[fd00:ec2::254]/", "https://a.example.com:0/", "https://a.example.com:99999/",
        "https://a.example.com/#fragment", "https://a.example.com\\@10.0.0.1/",
        "https://127.0.0.1%2f.example.com/", "https://%31%32%37.0.0.1/", "https://ex ample.com/",
        "https://a.example.com/\n", "https://\uff25.com/",
        "https://a.example.com/" + "x" * 2000, "https://[fe80::1%25eth0]/", "https://[64:ff9b::10.0.0.1]/",
    ],
)  # fmt: skip
async def test_a_url_that_is_no_public_https_destination_is_refused(url: str) -> None:
    assert problem_of(url) is not None


@pytest.mark.parametrize(
    "url",
    [
        URL,
        "https://a.example.com:8443/x?y=z",
        "https://9.9.9.9/",
        "https://[2606:4700::1111]/",
        "https://a-b.c_d.example/",
    ],
)
async def test_a_public_https_url_is_taken(url: str) -> None:
    assert problem_of(url) is None


async def test_a_refused_url_names_its_field(gateway: Gateway) -> None:
    user = await gateway.register()
    for method, path in (("POST", "/user/webhooks"), ("PUT", "/user/webhooks/1")):
        refused = await ask(user, method, path, {"url": "https://10.0.0.1/"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "url")
    assert (await ask(user, "PUT", "/user/webhooks/1", {})).status_code == 400


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "169.254.169.254", "172.16.0.1",
        "172.31.255.255", "192.0.0.192", "192.168.1.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
        "255.255.255.255", "168.63.129.16", "::", "::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
        "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "2002:7f00:1::",
        "2001::1", "2001:db8::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1",
        "100::1", "3fff::1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_for_everybody_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "9.9.9.9",
        "172.32.0.1",
        "100.128.0.1",
        "2606:4700::1111",
        "::ffff:9.9.9.9",
        "64:ff9b::909:909",
    ],
)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


# Sending.


async def test_an_event_arrives_signed(stage: Stage) -> None:
    delivery_id = await stage.event()
    assert await stage.instance().deliver_due() == 1
    ((headers, body),) = stage.receiver.got
    assert verified(stage.secret, headers, body)
    assert headers["webhook-id"] == f"msg_{delivery_id}"
    assert abs(int(headers["webhook-timestamp"]) - datetime.datetime.now(datetime.UTC).timestamp()) < 60
    message = orjson.loads(body)
    assert message["type"] == "budget.threshold_reached"
    event_id = message["data"].pop("event_id")
    assert message["data"] == {
        "level": 80, "budget": 5, "spent": 4.000000001, "window": "month",
        "window_start": "2026-11-01T00:00:00+00:00",
        "end_user": "customer-17", "request_id": "0199f0a0-0000-7000-8000-000000000000",
    }  # fmt: skip
    delivery = await stage.delivery()
    assert (delivery["status"], delivery["attempts"], delivery["last_status"], delivery["event_id"]) == (
        "delivered",
        1,
        204,
        event_id,
    )
    assert await stage.instance().deliver_due() == 0
    assert len(stage.receiver.got) == 1


async def test_a_key_that_reaches_its_budget_for_life_is_named(stage: Stage) -> None:
    key_id = await stage.database.value(
        "select id from public.api_keys_new where user_id = $1", stage.user.id
    )
    async with stage.database.owner() as owner:
        await owner.execute("set session_replication_role = replica")
    await stage.event(100, key_id=key_id, end_user=None)
    await stage.database.value("update public.budget_events set window_start = '-infinity' returning id")
    await stage.instance().deliver_due()
    data = orjson.loads(stage.receiver.got[0][1])["data"]
    assert (data["key_id"], data["window_start"], data["level"]) == (key_id, None, 100)
    assert "end_user" not in data


async def test_a_replaced_secret_signs_beside_the_new_one_until_its_grace_ends(stage: Stage) -> None:
    path = f"/user/webhooks/{stage.webhook_id}"
    rotated = (await ask(stage.user, "PUT", path, {"rotate_secret": True, "grace_period": 3600})).json()
    assert rotated["secret"] != stage.secret
    await stage.event()
    await stage.instance().deliver_due()
    headers, body = stage.receiver.got[0]
    assert verified(stage.secret, headers, body)
    assert verified(rotated["secret"], headers, body)
    await stage.database.value(
        "update public.webhooks set previous_valid_until = now() - interval '1 second' returning id"
    )
    await stage.event()
    await stage.instance().deliver_due()
    headers, body = stage.receiver.got[1]
    assert not verified(stage.secret, headers, body)
    assert verified(rotated["secret"], headers, body)


async def test_a_receiver_that_fails_is_tried_again_later_and_later_until_it_is_given_up(
    stage: Stage,
) -> None:
    stage.receiver.answers = [status(500)]
    await stage.event()
    waits = []
    for attempt in itertools.count(1):
        assert await stage.instance().deliver_due() == 0
        assert len(stage.receiver.got) == attempt
        delivery = await stage.delivery()
        assert (delivery["attempts"], delivery["last_status"]) == (attempt, 500)
        if delivery["status"] == "failed":
            break
        assert await stage.instance().deliver_due() == 0
        assert len(stage.receiver.got) == attempt, "it is not due yet"
        waits.append(round(await stage.due_again(), -1))
    assert tuple(waits) == RETRY_SECONDS == (60, 300, 1800, 7200, 43200)
    assert len({body for _, body in stage.receiver.got}) == 1
    assert len({headers["webhook-id"] for headers, _ in stage.receiver.got}) == 1
    await stage.due_again()
    await stage.instance().deliver_due()
    assert len(stage.receiver.got) == 6


async def test_a_receiver_that_recovers_gets_it(stage: Stage) -> None:
    stage.receiver.answers = [status(503), status(200)]
    await stage.event()
    await stage.instance().deliver_due()
    await stage.due_again()
    assert await stage.instance().deliver_due() == 1
    assert (await stage.delivery())["status"] == "delivered"


async def test_a_receiver_that_is_gone_gets_nothing_more(stage: Stage) -> None:
    stage.receiver.answers = [status(410)]
    await stage.event()
    await stage.instance().deliver_due()
    assert (await stage.delivery())["status"] == "failed"
    (webhook,) = (await ask(stage.user, "GET", "/user/webhooks")).json()["webhooks"]
    assert (webhook["is_active"], webhook["disabled_reason"]) == (False, "the receiver answered 410 Gone")
    await stage.event()
    await stage.instance().deliver_due()
    assert len(stage.receiver.got) == 1
    delivery = await stage.delivery()
    assert (delivery["status"], delivery["last_error"]) == ("failed", "the webhook is switched off")
    back = (await ask(stage.user, "PUT", f"/user/webhooks/{stage.webhook_id}", {"is_active": True})).json()[
        "webhook"
    ]
    assert (back["is_active"], back["disabled_reason"]) == (True, None)


async def test_a_redirect_is_not_followed(stage: Stage) -> None:
    stage.receiver.answers = [status(302, f"location: {stage.receiver.url}/elsewhere"), status(200)]
    await stage.event()
    assert await stage.instance().deliver_due() == 0
    assert len(stage.receiver.got) == 1
    assert "redirects are not followed" in (await stage.delivery())["last_error"]


async def test_a_receiver_that_does_not_answer_is_given_up_in_time(
    stage: Stage, trusting: Callable[..., Sender]
) -> None:
    stage.receiver.silent = True
    stage.make = lambda: trusting(seconds=0.3)
    await stage.event()
    await stage.instance().deliver_due()
    delivery = await stage.delivery()
    assert (delivery["status"], delivery["last_error"], delivery["last_status"]) == (
        "pending",
        "no answer in time",
        None,
    )


async def test_an_endless_answer_is_not_read(stage: Stage) -> None:
    stage.receiver.answers = [b"HTTP/1.1 200 OK\r\n\r\n"]
    stage.receiver.endless = True
    await stage.event()
    assert await stage.instance().deliver_due() == 1


async def test_headers_without_end_are_not_read(stage: Stage) -> None:
    stage.receiver.answers = [b"HTTP/1.1 200 OK\r\nx: "]
    stage.receiver.endless = True
    await stage.event()
    assert await stage.instance().deliver_due() == 0
    assert (await stage.delivery())["last_error"] == "the connection broke"


async def test_a_certificate_that_nobody_vouches_for_is_refused(
    stage: Stage, trusting: Callable[..., Sender]
) -> None:
    stage.make = lambda: trusting(tls=None)
    await stage.event()
    await stage.instance().deliver_due()
    assert stage.receiver.got == []
    assert "certificate" in (await stage.delivery())["last_error"]


async def test_the_senders_own_rule_refuses_loopback(stage: Stage, trusting: Callable[..., Sender]) -> None:
    stage.make = lambda: trusting(may_reach=is_public)
    await stage.event()
    await stage.instance().deliver_due()
    assert stage.receiver.got == []
    assert (await stage.delivery())["last_error"] == "the host has an address that is not public"


async def test_a_name_that_moves_to_a_private_address_after_it_was_checked_is_not_reached(
    receiver: Receiver, names: Names, trusting: Callable[..., Sender]
) -> None:
    names.answers = [["9.9.9.9"], ["127.0.0.1"]]
    assert await names.look_up(HOST, 443) == ["9.9.9.9"]
    async with sending(trusting, may_reach=is_public) as sender:
        attempt = await sender.post(receiver.url, b"{}", {})
    assert attempt.error == "the host has an address that is not public"
    assert names.asked == 2
    assert receiver.got == []


async def test_what_was_checked_is_what_is_connected_to(
    receiver: Receiver, names: Names, trusting: Callable[..., Sender]
) -> None:
    """A second look-up, which could find another address, is never made."""
    names.answers = [["127.0.0.1"], ["127.0.0.2"]]
    seen: list[str] = []

    def may_reach(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        seen.append(str(address))
        return True

    async with sending(trusting, may_reach=may_reach) as sender:
        assert (await sender.post(receiver.url, b"{}", {})).delivered
    assert names.asked == 1
    assert seen == ["127.0.0.1", "127.0.0.1"], "looked up, and connected to"


async def test_one_private_address_among_public_ones_is_enough_to_refuse(
    receiver: Receiver, names: Names, trusting: Callable[..., Sender]
) -> None:
    names.answers = [["9.9.9.9", "127.0.0.1"]]
    async with sending(trusting, may_reach=is_public) as sender:
        assert (
            await sender.post(receiver.url, b"{}", {})
        ).error == "the host has an address that is not public"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "127.1", "2130706433", "0x7f.0.0.1", "%31%32%37.0.0.1"],
)
async def test_an_address_in_the_url_is_checked_as_well(
    receiver: Receiver, trusting: Callable[..., Sender], host: str
) -> None:
    async with sending(trusting, may_reach=is_public) as sender:
        attempt = await sender.post(f"https://{host}:{receiver.port}/", b"{}", {})
    assert not attempt.delivered
    assert attempt.error is not None
    assert receiver.got == []


async def test_each_send_looks_the_name_up_again(
    receiver: Receiver, names: Names, trusting: Callable[..., Sender]
) -> None:
    async with sending(trusting) as sender:
        for _ in range(3):
            assert (await sender.post(receiver.url, b"{}", {})).delivered
    assert names.asked == 3


async def test_a_name_that_does_not_exist_is_said_so(
    receiver: Receiver, trusting: Callable[..., Sender]
) -> None:
    async def nowhere(_host: str, _port: int) -> list[str]:
        raise OSError("no such name")

    async with sending(trusting, look_up=nowhere) as sender:
        assert (await sender.post(receiver.url, b"{}", {})).error == "the host's name cannot be resolved"


async def test_a_budget_that_a_real_request_uses_up_is_told(stage: Stage) -> None:
    fixed = {"model": "sandbox/fixed-price", "user": "customer-17"}  # which costs what it holds
    budget = Decimal((await stage.user.chat(**fixed)).headers["x-gateway-cost"]) * Decimal("1.5")
    order = {
        "end_user": "customer-17",
        "budget": str(budget.quantize(Decimal("1e-9"))),
        "budget_window": "month",
    }
    assert (await ask(stage.user, "POST", "/user/end-users", order)).status_code == 201
    sent = await stage.user.chat(**fixed)
    assert sent.status_code == 200, sent.text
    assert await stage.instance().deliver_due() == 1
    data = orjson.loads(stage.receiver.got[0][1])["data"]
    assert (data["end_user"], data["request_id"], data["window"]) == (
        "customer-17",
        sent.headers["x-request-id"],
        "month",
    )
    assert (data["level"], Decimal(str(data["budget"]))) == (50, Decimal(order["budget"]))
    (event,) = (await ask(stage.user, "GET", "/user/budget-events")).json()["events"]
    assert (event["id"], event["level"], event["spent"]) == (data["event_id"], data["level"], data["spent"])
    (standing,) = (await ask(stage.user, "GET", "/user/end-users")).json()["end_users"]
    assert (standing["spent"], standing["held"]) == (data["spent"], 0)


# Several instances.


async def test_two_instances_never_send_one_delivery(stage: Stage) -> None:
    for _ in range(40):
        await stage.event()
    arrived = await asyncio.gather(*(stage.instance().deliver_due() for _ in range(4)))
    assert sum(arrived) == len(stage.receiver.got) == 40
    assert len({headers["webhook-id"] for headers, _ in stage.receiver.got}) == 40
    assert stage.receiver.most_connections <= 4 * 8


async def test_a_delivery_that_a_crash_left_behind_is_due_when_its_lease_ends(stage: Stage) -> None:
    delivery_id = await stage.event()
    client = stage.gateway.app.state.service.runtime.client
    (claimed,) = await db.claim_deliveries(client, limit=10, lease_seconds=90, delivery_id=None)
    assert claimed["id"] == delivery_id
    assert await stage.instance().deliver_due() == 0, "somebody has it"
    assert 80 < await stage.due_again() <= 90
    assert await stage.instance().deliver_due() == 1
    late: DeliveryAttempt = {
        "id": delivery_id,
        "attempt": claimed["attempts"],
        "status": 500,
        "error": "late",
        "delivered": False,
        "gone": True,
        "retry_seconds": None,
    }
    assert await db.finish_delivery(client, late) == {"outcome": "stale"}
    delivery = await stage.delivery()
    assert (delivery["status"], delivery["attempts"]) == ("delivered", 2)


async def test_a_secret_that_cannot_be_read_is_said_so(stage: Stage) -> None:
    await stage.database.value("update public.webhooks set encrypted_secret = 'gAAAAnonsense' returning id")
    await stage.event()
    await stage.instance().deliver_due()
    assert stage.receiver.got == []
    assert "rotate it" in (await stage.delivery())["last_error"]


# Through the gateway itself.


async def test_the_sweep_delivers(stage: Stage) -> None:
    """The production sender refuses this receiver, as it must: its name has no address anywhere."""
    await stage.database.value("update public.webhooks set url = 'https://hooks.invalid/' returning id")
    await stage.event()
    await stage.gateway.admin("GET", "/internal/sweep")
    delivery = await stage.delivery()
    assert (delivery["attempts"], delivery["last_error"]) == (1, "the host's name cannot be resolved")


async def test_a_test_tells_at_once_how_it_was_received_and_once_a_minute(stage: Stage) -> None:
    await stage.database.value("update public.webhooks set url = 'https://hooks.invalid/' returning id")
    path = f"/user/webhooks/{stage.webhook_id}/test"
    tested = (await ask(stage.user, "POST", path)).json()
    assert (tested["delivery"]["status"], tested["delivery"]["event_id"]) == ("pending", None)
    assert tested["delivery"]["last_error"] == "the host's name cannot be resolved"
    again = await ask(stage.user, "POST", path)
    assert (again.status_code, again.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(again.headers["retry-after"]) <= 60
    await stage.database.value("update public.webhooks set url = $1 returning id", stage.receiver.url)
    await stage.due_again()
    assert await stage.instance().deliver_due() == 1
    headers, body = stage.receiver.got[0]
    assert verified(stage.secret, headers, body)
    assert orjson.loads(body)["type"] == "webhook.test"


async def test_deliveries_are_paged_and_shown_to_their_owner_only(stage: Stage) -> None:
    ids = [await stage.event() for _ in range(3)]
    seen: list[int] = []
    cursor = ""
    while cursor is not None:
        page = (
            await ask(stage.user, "GET", f"/user/webhooks/deliveries?limit=2{cursor and '&cursor=' + cursor}")
        ).json()
        seen += [delivery["id"] for delivery in page["deliveries"]]
        cursor = page["next_cursor"]
    assert seen == ids[::-1]
    other = await stage.gateway.register()
    assert (await ask(other, "GET", "/user/webhooks/deliveries")).json()["deliveries"] == []


async def test_a_deleted_webhooks_deliveries_go_with_it(stage: Stage) -> None:
    await stage.event()
    await ask(stage.user, "DELETE", f"/user/webhooks/{stage.webhook_id}")
    assert await stage.instance().deliver_due() == 0
    assert stage.receiver.got == []


async def test_the_documented_way_to_verify_a_message_works(stage: Stage) -> None:
    text = await asyncio.to_thread((ROOT / "docs" / "spending.md").read_text)
    code = text.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    await stage.event()
    await stage.instance().deliver_due()
    headers, body = stage.receiver.got[0]
    assert names["is_ours"](stage.secret, headers, body)
    assert not names["is_ours"](stage.secret, headers, body + b" ")
