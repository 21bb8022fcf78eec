"""Bodies about webhooks, their deliveries, and budget events. A secret is only ever in `secret`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gateway.webhooks.public_addresses import problem_of
from models import Credits, RequestModel

DAY_SECONDS = 86400


def _destination(url: str) -> str:
    problem = problem_of(url)
    if problem is not None:
        raise ValueError(problem)
    return url


WebhookUrl = Annotated[str, AfterValidator(_destination)]


class WebhookOrder(RequestModel):
    """Where events are to be sent: an https URL at a public address."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"url": "https://hooks.example.com/budgets"}]})

    url: WebhookUrl


class WebhookChange(RequestModel):
    """Fields that are left out stay as they are."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"is_active": False}, {"rotate_secret": True, "grace_period": 86400}]}
    )

    url: WebhookUrl | None = None
    is_active: bool | None = None
    rotate_secret: bool = Field(
        default=False,
        description="Make a new secret, shown this once; the old one signs beside it for the grace period",
    )
    grace_period: Annotated[int, Field(strict=True, ge=0, le=30 * DAY_SECONDS)] = Field(
        default=DAY_SECONDS, description="Seconds"
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.url is None and self.is_active is None and not self.rotate_secret:
            raise ValueError("names nothing to change")
        return self


class WebhookView(BaseModel):
    id: int
    url: str
    is_active: bool
    disabled_reason: str | None = Field(description="Why the gateway switched it off; null when you did")
    previous_valid_until: str | None = Field(
        description="How long the replaced secret signs beside the present one"
    )
    created_at: str
    updated_at: str


class Webhooks(BaseModel):
    status: str
    webhooks: list[WebhookView]


class WebhookKept(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "status": "success",
                    "message": "Keep the secret: it is shown this once.",
                    "webhook": {
                        "id": 1,
                        "url": "https://hooks.example.com/budgets",
                        "is_active": True,
                        "disabled_reason": None,
                        "previous_valid_until": None,
                        "created_at": "2026-11-24T12:00:00+00:00",
                        "updated_at": "2026-11-24T12:00:00+00:00",
                    },
                    "secret": "whsec_" + "A" * 43 + "=",
                }
            ]
        }
    )

    status: str
    message: str
    webhook: WebhookView
    secret: str | None = Field(
        default=None, description="`whsec_...`, shown this once: it verifies `webhook-signature`"
    )


class DeliveryView(BaseModel):
    """One message to one webhook. Failed attempts are repeated after 1, 5 and 30 minutes, 2 and 12 hours."""

    id: int
    event_id: int | None = Field(description="null for a test")
    webhook_id: int
    status: str = Field(description="pending, delivered or failed")
    attempts: int
    next_attempt_at: str | None
    delivered_at: str | None
    failed_at: str | None
    last_status: int | None
    last_error: str | None
    created_at: str


class Deliveries(BaseModel):
    status: str
    deliveries: list[DeliveryView]
    next_cursor: str | None


class DeliveryTested(BaseModel):
    status: str
    message: str
    delivery: DeliveryView


class BudgetEvent(BaseModel):
    """A key, or one of your end users, has spent this percentage of its budget."""

    id: int
    key_id: int | None
    end_user: str | None
    level: int
    budget: Credits
    spent: Credits
    budget_window: str
    window_start: str | None
    request_id: str
    created_at: str


class BudgetEvents(BaseModel):
    status: str
    events: list[BudgetEvent]
    next_cursor: str | None
