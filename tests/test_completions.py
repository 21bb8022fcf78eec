"""A completion, end to end: the official SDK against a gateway on a socket."""

from __future__ import annotations

from decimal import Decimal

from conftest import Gateway, Upstream


async def test_a_completion_is_charged_what_the_upstream_billed(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    answer = await user.sdk().chat.completions.create(model="openai/gpt-4o-mini", messages=[{"role": "user", "content": "Hi"}])
    assert answer.choices[0].message.content
    (record,) = await user.records()
    assert Decimal(str(record["cost"])) == upstream.sandbox.state.billed > 0
    assert record["status"] == "completed"
    await live_gateway.database.assert_books_balance()
