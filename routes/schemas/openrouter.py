"""OpenRouter's shapes of keys, credits and generations (its OpenAPI file, August 2026).

Amounts are credits, which are US dollars.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models import Credits


def _example(**fields: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [fields]})


class KeyRateLimit(BaseModel):
    requests: int = Field(description="-1 is unlimited")
    interval: str
    note: str = Field(description="Where all limits are listed")


class FreeRequests(BaseModel):
    """Requests to free models a day: they count with all others here, so none are allowed (0) or as many as
    those (-1).
    """

    limit: int
    remaining: int
    used: int


class KeyData(BaseModel):
    """The caller's key. `usage` is what it was charged; days, weeks and months are UTC."""

    label: str = Field(description="The key, masked")
    limit: Credits | None = Field(description="The key's budget; null: none")
    limit_remaining: Credits | None
    limit_reset: Literal["daily", "weekly", "monthly"] | None
    include_byok_in_limit: bool
    usage: Credits
    usage_daily: Credits
    usage_weekly: Credits
    usage_monthly: Credits
    byok_usage: Credits = Field(
        description="What requests under the user's own upstream key cost at the provider"
    )
    byok_usage_daily: Credits
    byok_usage_weekly: Credits
    byok_usage_monthly: Credits
    is_free_tier: bool
    is_management_key: bool
    is_provisioning_key: bool
    expires_at: str | None
    creator_user_id: str | None
    organization_id: str | None
    workspace_id: str | None
    allowed_data_regions: list[Literal["global", "europe", "us"]]
    free_model_daily_requests: FreeRequests
    rate_limit: KeyRateLimit


class KeyAnswer(BaseModel):
    model_config = _example(
        data={
            "label": "gw_live_...Ab3d",
            "limit": 50,
            "limit_remaining": 48.75,
            "limit_reset": "monthly",
            "include_byok_in_limit": False,
            "usage": 12.5,
            "usage_daily": 0.25,
            "usage_weekly": 1.25,
            "usage_monthly": 1.25,
            "byok_usage": 0,
            "byok_usage_daily": 0,
            "byok_usage_weekly": 0,
            "byok_usage_monthly": 0,
            "is_free_tier": False,
            "is_management_key": False,
            "is_provisioning_key": False,
            "expires_at": None,
            "creator_user_id": "1",
            "organization_id": None,
            "workspace_id": None,
            "allowed_data_regions": ["global"],
            "free_model_daily_requests": {"limit": 0, "remaining": 0, "used": 0},
            "rate_limit": {
                "requests": 60,
                "interval": "1m",
                "note": "GET /user/limit shows all limits of this key.",
            },
        }
    )

    data: KeyData


class CreditsData(BaseModel):
    total_credits: Credits = Field(
        description="Everything granted and bought, less what has expired or was taken back"
    )
    total_usage: Credits = Field(
        description="Everything charged, less refunds; the difference of the two is the balance"
    )


class CreditsAnswer(BaseModel):
    model_config = _example(data={"total_credits": 100.5, "total_usage": 25.75})

    data: CreditsData


class GenerationData(BaseModel):
    """One of the caller's requests, in the form of OpenRouter's generations. Costs are what was charged; what
    is not known here is null.
    """

    id: str = Field(description="`gen-...`; our request id where the upstream gave none")
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
    num_fetches: int | None = None
    web_search_engine: str | None = None
    data_region: Literal["global", "europe", "us"] = "global"
    latency: int | None = Field(
        description="Milliseconds to the first token; of an answer that was not streamed, to its end"
    )
    generation_time: int | None = Field(description="Milliseconds from the first token to the end")
    moderation_latency: int | None = None
    origin: str = ""
    http_referer: str | None = None
    user_agent: str | None = None
    app_id: int | None = None
    external_user: str | None
    session_id: str | None = None
    preset_id: str | None = None
    workspace_id: str | None = None
    router: str | None = None
    service_tier: str | None = None
    provider_responses: list[dict[str, Any]] | None = None


class GenerationAnswer(BaseModel):
    model_config = _example(
        data={
            "id": "gen-1786988078-NGfm",
            "request_id": "0199f0a0-0000-7000-8000-000000000000",
            "model": "openai/gpt-4o-mini",
            "provider_name": "OpenAI",
            "created_at": "2026-11-24T12:00:00+00:00",
            "streamed": True,
            "cancelled": False,
            "finish_reason": "stop",
            "total_cost": 0.00002055,
            "usage": 0.00002055,
            "is_byok": False,
            "tokens_prompt": 15,
            "tokens_completion": 26,
            "latency": 310,
            "generation_time": 540,
        }
    )

    data: GenerationData


class CountAnswer(BaseModel):
    model_config = _example(data={"count": 412})

    data: dict[str, int]
