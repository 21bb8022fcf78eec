"""One model costs as much as its request can cost at most, for tests of holds."""

from __future__ import annotations

from decimal import Decimal

import pytest

from sandbox.app import ENDPOINTS
from sandbox.models.market import Market
from sandbox.planning import Limits, RequestSettings
from sandbox.scenarios import parse_scenarios


@pytest.mark.parametrize("path", ["/chat/completions", "/responses", "/messages"])
def test_one_model_costs_what_it_can_cost_at_most(path: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    fields = {"input": messages} if path == "/responses" else {"messages": messages, "max_tokens": 10}
    plan, _ = ENDPOINTS[path](
        {"model": "sandbox/fixed-price", **fields},
        RequestSettings(parse_scenarios("ordinary"), Limits(), Market()),
    )
    assert plan.generation.cost == Decimal("0.5")
