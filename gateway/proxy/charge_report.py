"""Gateway_usage and cost headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.money import plain_credits


def gateway_usage(request_id: str, tokens: int, settled: Mapping[str, Any] | None) -> bytes:
    """The JSON object that every completion carries; `settled` is the database's answer, None while the
    charge is open.
    """
    cost, balance = (
        plain_credits(settled[name]) if settled else "null" for name in ("cost_nanos", "balance_nanos")
    )
    pending = "" if settled else ',"settlement":"pending"'
    return f'{{"request_id":"{request_id}","tokens_charged":{tokens},"cost":{cost},"user_balance_after":{balance}{pending}}}'.encode()


def charge_headers(settled: Mapping[str, Any] | None) -> dict[str, str]:
    """The same for the headers of an answer that is sent after its settlement."""
    if settled is None:
        return {"x-gateway-settlement": "pending"}
    return {
        "x-gateway-cost": plain_credits(settled["cost_nanos"]),
        "x-gateway-balance": plain_credits(settled["balance_nanos"]),
    }
