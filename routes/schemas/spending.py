"""Bodies about receipts, quotes, users' own upstream keys, and budgets of end users.

Amounts are credits, which are US dollars, unless their names end with `_nanos`.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from models import Credits, RequestModel

Window = Literal["day", "week", "month", "lifetime"]
# All endpoints that take JSON.
QuotedEndpoint = Literal[
    "chat/completions",
    "completions",
    "embeddings",
    "responses",
    "messages",
    "rerank",
    "images",
    "audio/speech",
]


def _example(**fields: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [fields]})


# Receipts.


class ReceiptHold(BaseModel):
    """What was held before anything was sent, and what it was made of."""

    amount: Credits
    granted_output_tokens: int
    price_basis: dict[str, Any] | None = Field(
        description="Without markup: fixed_nanos and output_nanos (one output token) in nano-dollars, "
        "max_price as it was sent"
    )
    expires_at: str


class ReceiptTokens(BaseModel):
    prompt: int | None
    completion: int | None
    cached: int | None
    reasoning: int | None


class ReceiptCharge(BaseModel):
    """`charged` = `upstream_cost` x `markup`, rounded up to a nano-dollar, less `overrun`, which the operator
    bears.
    """

    upstream_cost: Credits | None
    markup: Decimal
    charged: Credits
    markup_amount: Credits | None
    overrun: Credits
    refunded: Credits
    balance_after: Credits | None


class ReceiptTimings(BaseModel):
    created_at: str
    settled_at: str | None
    latency_ms: int | None
    time_to_first_token_ms: int | None


class ReceiptEnding(BaseModel):
    settlement_source: str | None = Field(
        description="Where the cost is from: usage, generation, or none where nobody knew it"
    )
    finish_reason: str | None
    error_code: str | None


class ReceiptRefund(BaseModel):
    transaction_id: int
    amount: Credits
    balance_after: Credits
    reason: str
    created_at: str


class Receipt(BaseModel):
    """Everything that the books say about one request. While it is `pending` its hold stays, and there is no
    charge yet.
    """

    model_config = _example(
        request_id="0199f0a0-0000-7000-8000-000000000000",
        client_request_id=None,
        generation_id="gen-1786988078-NGfm",
        status="completed",
        message="Settled.",
        key_id=1,
        end_user="customer-17",
        environment="live",
        mode="live",
        byok=False,
        cache_hit=False,
        endpoint="chat/completions",
        model="openai/gpt-4o-mini",
        model_used="openai/gpt-4o-mini",
        provider="OpenAI",
        streamed=False,
        hold={
            "amount": 0.0000429,
            "granted_output_tokens": 50,
            "price_basis": {
                "fixed_nanos": "12900",
                "output_nanos": "600",
                "max_price": {"prompt": "0.15", "completion": "0.6"},
            },
            "expires_at": "2026-11-24T12:15:00+00:00",
        },
        tokens={"prompt": 15, "completion": 26, "cached": 0, "reasoning": 0},
        charge={
            "upstream_cost": 0.00001785,
            "markup": 1.1,
            "charged": 0.000019635,
            "markup_amount": 0.000001785,
            "overrun": 0,
            "refunded": 0,
            "balance_after": 9.999980365,
        },
        timings={
            "created_at": "2026-11-24T12:00:00+00:00",
            "settled_at": "2026-11-24T12:00:01+00:00",
            "latency_ms": 850,
            "time_to_first_token_ms": None,
        },
        ending={"settlement_source": "usage", "finish_reason": "stop", "error_code": None},
        refunds=[],
    )

    request_id: str
    client_request_id: str | None
    generation_id: str | None
    status: Literal["pending", "completed", "failed", "cancelled", "expired"]
    message: str
    key_id: int
    end_user: str | None
    environment: str
    mode: str
    byok: bool
    cache_hit: bool
    endpoint: str
    model: str
    model_used: str | None
    provider: str | None
    streamed: bool
    hold: ReceiptHold
    tokens: ReceiptTokens | None
    charge: ReceiptCharge | None
    timings: ReceiptTimings
    ending: ReceiptEnding | None
    refunds: list[ReceiptRefund]


# Quotes.


class QuoteOrder(RequestModel):
    """A request body, as it would be sent to this endpoint."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "endpoint": "chat/completions",
                    "body": {
                        "model": "openai/gpt-4o-mini",
                        "messages": [{"role": "user", "content": "Say hello."}],
                        "max_tokens": 100,
                    },
                    "output_tokens": 20,
                }
            ]
        },
    )

    endpoint: QuotedEndpoint = "chat/completions"
    body: dict[str, Any]
    output_tokens: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] | None = Field(
        default=None,
        description="How long an answer you expect, for the estimate; null: 256 tokens, or the limit where "
        "that is less",
    )


class Quote(BaseModel):
    """An estimate for this moment: nothing is held or counted, prices and balances move, and rate limits are
    not checked.
    """

    model_config = _example(
        models=["openai/gpt-4o-mini"],
        would_hold=0.0000729,
        needed=0.0000729,
        estimated_cost=0.0000151,
        estimated_output_tokens=20,
        prompt_tokens_estimate=21,
        max_output_tokens=100,
        affordable_max_tokens=None,
        affordable=True,
        reason=None,
        available=9.99998,
        byok=False,
        free=False,
        markup=1,
        price_basis={
            "fixed_nanos": "12900",
            "output_nanos": "600",
            "max_price": {"prompt": "0.15", "completion": "0.6"},
        },
        message="An estimate of this moment: nothing is held or counted, and rate limits are not looked at.",
    )

    models: list[str] = Field(description="Every model that the body can reach; the dearest of them counts")
    would_hold: Credits = Field(
        description="Where the request would be refused: what it would hold if nothing stood in its way"
    )
    needed: Credits = Field(
        description="The least that has to be available: `would_hold`, or the hold of a short answer where "
        "the body sets no output limit"
    )
    estimated_cost: Credits = Field(
        description="With `estimated_output_tokens`; never more than `would_hold`"
    )
    estimated_output_tokens: int
    prompt_tokens_estimate: int
    max_output_tokens: int = Field(description="What admission would grant; 0 where it would refuse")
    affordable_max_tokens: int | None = Field(
        description="Where credits or a budget are short: the largest output limit that they cover, 0 for "
        "none; else null"
    )
    affordable: bool
    reason: str | None = Field(description="The code of the refusal, null where it would be let through")
    available: Credits | None = Field(
        description="What the account, the key's budget and the end user's leave; null where none counts"
    )
    byok: bool
    free: bool
    markup: Decimal
    price_basis: dict[str, Any]
    message: str


# Users' own upstream keys.


class ProviderKeyOrder(RequestModel):
    model_config = _example(key="sk-or-v1-" + "0" * 64)

    key: Annotated[str, StringConstraints(pattern=r"^sk-or-v1-[0-9a-f]{64}$")] = Field(
        description="An OpenRouter key", repr=False
    )


class ProviderKeyView(BaseModel):
    model_config = _example(
        status="success",
        provider_key={
            "label": "sk-or-v1-012...def",
            "is_active": True,
            "created_at": "2026-11-24T12:00:00+00:00",
            "updated_at": "2026-11-24T12:00:00+00:00",
        },
        checked=True,
    )

    status: str
    provider_key: dict[str, Any] | None
    checked: bool | None = Field(
        default=None, description="Whether OpenRouter was asked about it; false: it could not be reached"
    )


# Budgets of end users.

Budget = Annotated[Decimal, Field(ge=0, le=1_000_000_000, decimal_places=9)]


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("takes printable characters only")
    return name


EndUserName = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_printable)]


class EndUserOrder(RequestModel):
    """A budget for one of your customers, as requests name them (`user`, or the header `x-end-user`); `*`
    stands for each customer without one of their own.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"end_user": "customer-17", "budget": 5, "budget_window": "month"}]}
    )

    end_user: EndUserName
    budget: Budget
    budget_window: Window


class EndUserChange(RequestModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"budget": 10}]})

    budget: Budget | None = None
    budget_window: Window | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.budget is None and self.budget_window is None:
            raise ValueError("names nothing to change")
        return self


class EndUserView(BaseModel):
    """A budget, and what is spent of it in the present window. Under `*` each end user has a budget of their
    own: ask for one by name to see theirs.
    """

    model_config = _example(
        id=1,
        end_user="customer-17",
        budget_of="customer-17",
        budget=5,
        budget_window="month",
        window_start="2026-11-01T00:00:00+00:00",
        spent=1.25,
        held=0.01,
        remaining=3.74,
        created_at="2026-11-01T09:00:00+00:00",
        updated_at="2026-11-01T09:00:00+00:00",
    )

    id: int
    end_user: str
    budget_of: str = Field(description="The end user's own name, or * where the default applies")
    budget: Credits
    budget_window: Window
    window_start: str | None
    spent: Credits
    held: Credits
    remaining: Credits
    created_at: str
    updated_at: str


class EndUsers(BaseModel):
    status: str
    end_users: list[EndUserView]
    next_cursor: str | None
