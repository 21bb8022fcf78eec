"""What the client is told of its charge: `gateway_usage` in the body, and cost and balance in the headers."""

from __future__ import annotations

from common.money import plain_credits
from gateway.billing.hold import Charge


def gateway_usage(request_id: str, tokens: int, charge: Charge | None) -> bytes:
    """The JSON object that every completion carries; `charge` is None while it is not known."""
    cost = balance = "null"
    pending = ',"settlement":"pending"'
    if charge is not None:
        cost, balance = plain_credits(charge["cost_nanos"]), plain_credits(charge["balance_nanos"])
        pending = ""
    # Written by hand: it is on the way of every request, and a JSON encoder would need the decimals as text
    # first.
    ids_and_tokens = f'"request_id":"{request_id}","tokens_charged":{tokens}'
    return f'{{{ids_and_tokens},"cost":{cost},"user_balance_after":{balance}{pending}}}'.encode()


def charge_headers(charge: Charge | None) -> dict[str, str]:
    """The same for the headers of an answer that is sent after its settlement."""
    if charge is None:
        return {"x-gateway-settlement": "pending"}
    return {
        "x-gateway-cost": plain_credits(charge["cost_nanos"]),
        "x-gateway-balance": plain_credits(charge["balance_nanos"]),
    }
