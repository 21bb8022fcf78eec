"""What do requests and answers about spending look like? OpenRouter's shapes of keys and generations, receipts and quotes, budgets.

The same rules as in `models`. Amounts are credits, which are US dollars.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from models import Credits, RequestModel

Window = Literal["day", "week", "month", "lifetime"]
QuotedEndpoint = Literal["chat/completions", "completions", "embeddings"]


def _example(**fields: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [fields]})


# OpenRouter's shapes.


class KeyRateLimit(BaseModel):
    requests: int = Field(description="-1 is unlimited")
    interval: str


class KeyData(BaseModel):
    """The key that asks. `usage` is what it was charged; days, weeks and months are UTC."""

    label: str = Field(description="The key, masked")
    limit: Credits | None = Field(description="The key's budget; null: none")
    limit_remaining: Credits | None
    limit_reset: Literal["daily", "weekly", "monthly"] | None
    include_byok_in_limit: bool
    usage: Credits
    usage_daily: Credits
    usage_weekly: Credits
    usage_monthly: Credits
    byok_usage: Credits = Field(description="What requests cost at the provider that went out with the user's own upstream key")
    byok_usage_daily: Credits
    byok_usage_weekly: Credits
    byok_usage_monthly: Credits
    is_free_tier: bool
    is_management_key: bool
    is_provisioning_key: bool
    expires_at: str | None
    creator_user_id: str | None
    rate_limit: KeyRateLimit


class KeyAnswer(BaseModel):
    data: KeyData


class CreditsData(BaseModel):
    total_credits: Credits = Field(description="Everything granted and bought, less what has expired or was taken back")
    total_usage: Credits = Field(description="Everything charged, less refunds; the difference of the two is the balance")


class CreditsAnswer(BaseModel):
    model_config = _example(data={"total_credits": 100.5, "total_usage": 25.75})

    data: CreditsData


class GenerationData(BaseModel):
    """A request of the caller's, as OpenRouter tells of a generation. Costs are what was charged; what is not known here is null."""

    id: str | None
    upstream_id: str | None = None
    request_id: str
    model: str
    provider_name: str | None
    api_type: str
    created_at: str
    streamed: bool
    cancelled: bool
    finish_reason: str | None
    native_finish_reason: str | None = None
    total_cost: Credits
    usage: Credits
    upstream_inference_cost: Credits | None
    is_byok: bool
    cache_discount: Credits | None = None
    tokens_prompt: int | None
    tokens_completion: int | None
    native_tokens_prompt: int | None
    native_tokens_completion: int | None
    native_tokens_reasoning: int | None
    native_tokens_cached: int | None
    native_tokens_completion_images: int | None = None
    num_media_prompt: int | None = None
    num_media_completion: int | None = None
    num_input_audio_prompt: int | None = None
    num_search_results: int | None = None
    latency: int | None = Field(description="Milliseconds to the first token; of an answer that was not streamed, to its end")
    generation_time: int | None = Field(description="Milliseconds from the first token to the end")
    moderation_latency: int | None = None
    origin: str = ""
    http_referer: str | None = None
    user_agent: str | None = None
    app_id: int | None = None
    external_user: str | None
    session_id: str | None = None
    preset_id: str | None = None
    router: str | None = None
    service_tier: str | None = None
    provider_responses: list[dict[str, Any]] | None = None


class GenerationAnswer(BaseModel):
    data: GenerationData


class CountAnswer(BaseModel):
    model_config = _example(data={"count": 412})

    data: dict[str, int]


# Receipts.


class ReceiptHold(BaseModel):
    """What was held before anything was sent, and what it was made of."""

    amount: Credits
    granted_output_tokens: int
    price_basis: dict[str, Any] | None = Field(
        description="Without markup: fixed_nanos and output_nanos (one output token) in nano-dollars, max_price as it was sent"
    )
    expires_at: str


class ReceiptTokens(BaseModel):
    prompt: int | None
    completion: int | None
    cached: int | None
    reasoning: int | None


class ReceiptCharge(BaseModel):
    """`charged` = `upstream_cost` x `markup`, rounded up to a nano-dollar, less `overrun`, which the operator bears."""

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
    settlement_source: str | None = Field(description="Where the cost is from: usage, generation, or none where nobody knew it")
    finish_reason: str | None
    error_code: str | None


class ReceiptRefund(BaseModel):
    transaction_id: int
    amount: Credits
    balance_after: Credits
    reason: str
    created_at: str


class Receipt(BaseModel):
    """All that the books hold of one request. While it is `pending` there is no charge yet, and its hold stands."""

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
    """A body as it would be sent to this endpoint."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "endpoint": "chat/completions",
                    "body": {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 100},
                    "output_tokens": 20,
                }
            ]
        },
    )

    endpoint: QuotedEndpoint = "chat/completions"
    body: dict[str, Any]
    output_tokens: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] | None = Field(
        default=None, description="How long an answer you expect, for the estimate; null: 256 tokens, or the limit where that is less"
    )


class Quote(BaseModel):
    """An estimate of the moment: nothing is held or counted, prices and balances move, and rate limits are not looked at."""

    models: list[str] = Field(description="Every model that the body can reach; the dearest of them counts")
    would_hold: Credits
    estimated_cost: Credits
    estimated_output_tokens: int
    prompt_tokens_estimate: int
    max_output_tokens: int = Field(description="What admission would grant; 0 where it would refuse")
    affordable: bool
    reason: str | None = Field(description="The code of the refusal, null where it would be let through")
    available: Credits | None = Field(description="What the account, the key's budget and the end user's leave; null where none counts")
    byok: bool
    free: bool
    markup: Decimal
    price_basis: dict[str, Any]
    message: str


# Users' own upstream keys.


class ProviderKeyOrder(RequestModel):
    model_config = _example(key="sk-or-v1-" + "0" * 64)

    key: Annotated[str, StringConstraints(pattern=r"^sk-or-v1-[0-9a-f]{64}$")] = Field(description="An OpenRouter key", repr=False)


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
    checked: bool | None = Field(default=None, description="Whether OpenRouter was asked about it; false: it could not be reached")


# Budgets of end users.

Budget = Annotated[Decimal, Field(ge=0, le=1_000_000_000, decimal_places=9)]
EndUserName = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]


class EndUserOrder(RequestModel):
    """A budget for one of your customers, as requests name them (`user`, or the header `x-end-user`); `*` is each one's who has none."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"end_user": "customer-17", "budget": 5, "budget_window": "month"}]})

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
    """A budget and how it stands in the present window. That of `*` is each end user's own: ask for one to see how they stand."""

    id: int
    end_user: str
    budget_of: str = Field(description="The end user's own name, or * where the default applies")
    budget: Credits
    budget_window: Window
    window_start: str | None
    spent: Credits
    held: Credits
    remaining: Credits
    created_at: str | None = None
    updated_at: str | None = None


class EndUsers(BaseModel):
    status: str
    end_users: list[EndUserView]
    next_cursor: str | None
