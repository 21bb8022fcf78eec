"""Beta features reach the upstream only where they cost nothing and reach nobody else's data."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import orjson
import pytest

from gateway.proxy.beta_headers import beta_headers
from tests.support.gateway import Gateway, live
from tests.support.upstream import TEXT, Reply, running_script

THINKING, TOOLS = "interleaved-thinking-2025-05-14", "fine-grained-tool-streaming-2025-05-14"
ANSWER = {
    "id": "gen-1",
    "type": "message",
    "role": "assistant",
    "model": TEXT,
    "content": [{"type": "text", "text": "Hi"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 3, "output_tokens": 1, "cost": 0.00001},
}
QUESTION = {"model": TEXT, "max_tokens": 20, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("sent", "passed"),
    [
        ({"anthropic-beta": THINKING}, {"anthropic-beta": THINKING}),
        ({"x-anthropic-beta": f"{THINKING}, {TOOLS}"}, {"x-anthropic-beta": f"{THINKING},{TOOLS}"}),
        (
            {"anthropic-beta": "files-api-2025-04-14,claude-code-20250219,code-execution-2025-08-25"},
            {"anthropic-beta": "claude-code-20250219"},
        ),
        ({"anthropic-beta": "effort"}, {}),
        ({"anthropic-beta": "effort-2025-11-24\r\nx: y"}, {}),
        ({"anthropic-beta": ""}, {}),
        ({"beta": THINKING}, {}),
    ],
)
def test_what_changes_neither_cost_nor_reach_passes(sent: dict[str, str], passed: dict[str, str]) -> None:
    assert beta_headers(sent) == passed


@pytest.mark.parametrize("path", ["/v1/messages", "/api/v1/messages"])
async def test_the_upstream_is_told(start_gateway: Callable[..., Awaitable[Gateway]], path: str) -> None:
    async with running_script() as upstream:
        gateway = await start_gateway(**live(upstream.url))
        user = await gateway.register(credits=1)
        upstream.say(Reply([orjson.dumps(ANSWER)]))
        headers = {
            **user.headers,
            "anthropic-beta": f"files-api-2025-04-14,{THINKING}",
            "x-anthropic-beta": TOOLS,
        }
        assert (await gateway.http.post(path, headers=headers, json=QUESTION)).status_code == 200
        assert (await gateway.http.post(path, headers=user.headers, json=QUESTION)).status_code == 200
        told = [
            {name: value for name, value in sent.headers.items() if "beta" in name} for sent in upstream.sent
        ]
        assert told == [{"anthropic-beta": THINKING, "x-anthropic-beta": TOOLS}, {}]


async def test_an_answer_with_a_feature_is_no_answer_without_it(
    start_gateway: Callable[..., Awaitable[Gateway]],
) -> None:
    async with running_script() as upstream:
        gateway = await start_gateway(**live(upstream.url))
        user = await gateway.register(credits=1)
        upstream.say(Reply([orjson.dumps(ANSWER)]))
        cached = {**user.headers, "x-gateway-cache": "true"}
        found = [
            (await gateway.http.post("/v1/messages", headers=headers, json=QUESTION)).headers[
                "x-gateway-cache"
            ]
            for headers in (
                cached,
                {**cached, "anthropic-beta": THINKING},
                {**cached, "anthropic-beta": THINKING},
                cached,
            )
        ]
        assert found == ["MISS", "MISS", "HIT", "HIT"]
