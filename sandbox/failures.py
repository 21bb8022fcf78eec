"""OpenRouter's refusals, one for each status and shape. Each carries the operator's `user_id`, which must not
leak.

The shapes are those of https://openrouter.ai/docs/api-reference/errors, and of recorded responses where the
documentation shows none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

USER_ID = "user_2sAndBoxOperatorAccount00000"
KEY_HASH = "5d41402abc4b2a76b9719d911017c5925d41402abc4b2a76b9719d911017c592"


@dataclass(frozen=True, slots=True)
class Failure:
    """A status, the body's `error` object, and headers of this failure alone."""

    description: str
    status: int
    error: Mapping[str, object]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, object]:
        return {"error": self.error, "user_id": USER_ID}


class Refusal(Exception):
    """The request is refused with this failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.description)
        self.failure = failure


def refusal(status: int, message: str, **metadata: object) -> Refusal:
    """A refusal with a plain message and optional metadata."""
    return Refusal(_failure(message, status, message, **metadata))


def invalid_request(message: str) -> Refusal:
    """A 400 for a request that does not conform to the API's schema."""
    return refusal(400, message, error_type="invalid_request")


def _failure(description: str, status: int, message: str, **metadata: object) -> Failure:
    error: dict[str, object] = {"message": message, "code": status}
    if metadata:
        error["metadata"] = metadata
    return Failure(description, status, error)


def unavailable(model: str, code: str, status: int, excluded_by: list[str], detail: str) -> Failure:
    """An availability error, in the shape with `error_type` and `http_status` instead of `code`."""
    availability = {
        "code": code,
        "retryable": status == 503,
        "retry_after": 7 if status == 503 else None,
        "requested_models": [model],
        "affected_providers": [],
        "excluded_by": excluded_by,
        "fallback_models": [],
        "constraint": {"field": excluded_by[0], "detail": detail} if excluded_by else None,
        "docs_url": "https://openrouter.ai/docs/features/provider-routing",
    }
    return Failure(
        f"{status} {code}, in the shape with error_type and http_status",
        status,
        {
            "message": detail,
            "error_type": "not_found" if status == 404 else "provider_overloaded",
            "http_status": status,
            "availability": availability,
            "metadata": {"previous_errors": [{"provider": "DeepInfra", "code": status, "status": status}]},
        },
    )


def max_price_excludes(model: str) -> Failure:
    """The refusal when no provider serves the model at or below `provider.max_price`."""
    return unavailable(
        model,
        "constraint_filtered",
        404,
        ["max_price"],
        "No endpoints found that satisfy the requested max_price.",
    )


# https://docs.anthropic.com/en/api/errors, and OpenRouter's other statuses by the nearest of its types.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    524: "timeout_error",
    529: "overloaded_error",
}


def anthropic_error(error: Mapping[str, object], status: int) -> dict[str, object]:
    """The `error` object of `/messages`: Anthropic's type and message, then OpenRouter's other fields."""
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    metadata = error.get("metadata")
    error_type = metadata.get("error_type") if isinstance(metadata, Mapping) else None
    typed = {"error_type": error_type} if error_type else {}
    rest = {name: value for name, value in error.items() if name not in ("code", "http_status", "message")}
    return {"type": kind, "message": error["message"], **typed, **rest}


def anthropic_body(failure: Failure, generation_id: str | None) -> dict[str, object]:
    """A refusal as `/messages` writes it."""
    error = anthropic_error(failure.error, failure.status)
    return {"type": "error", "error": error, "request_id": generation_id, "user_id": USER_ID}


# Both messages end with a link; the second one contains a hash of the operator's key.
_TOO_DEAR = (
    "This request requires more credits, or fewer max_tokens. You requested up to 16384 tokens, "
    "but can only afford 59. To increase, visit "
)
_LOW_CREDIT = f"{_TOO_DEAR}https://openrouter.ai/settings/credits and upgrade to a paid account"
_KEY_LIMIT = (
    f"{_TOO_DEAR}https://openrouter.ai/workspaces/default/keys/{KEY_HASH} and adjust the key's daily limit"
)

FAILURES: Mapping[str, Failure] = {
    "error-400": _failure("400, an invalid request", 400, 'Input required: specify "prompt" or "messages"'),
    "error-400-context": _failure(
        "400, the prompt is too long (typed metadata)",
        400,
        "This endpoint's maximum context length is 8192 tokens. However, you requested about 9000 tokens.",
        error_type="context_length_exceeded",
        provider_code="context_length_exceeded",
    ),
    "error-401": _failure("401, the operator's key is refused", 401, "No auth credentials found"),
    "error-402": _failure(
        "402, the operator is out of credits",
        402,
        "Insufficient credits. Add more using https://openrouter.ai/credits",
    ),
    "error-402-max-tokens": _failure(
        "402, the operator's credits do not cover max_tokens", 402, _LOW_CREDIT, provider_name=None
    ),
    "error-402-key-limit": _failure(
        "402, the key's limit; the message leaks the operator's key hash", 402, _KEY_LIMIT, provider_name=None
    ),
    "error-403": _failure("403, permission denied", 403, "Permission denied", error_type="permission_denied"),
    "error-403-moderation": _failure(
        "403, input flagged by moderation",
        403,
        'openai/gpt-4o-mini requires moderation on OpenAI. Your input was flagged for "violence".',
        reasons=["violence"],
        flagged_input="How do I...",
        provider_name="OpenAI",
        model_slug="openai/gpt-4o-mini",
    ),
    "error-403-guardrail": _failure(
        "403, input blocked by a guardrail", 403, "Request blocked by guardrail", patterns=["credit_card"]
    ),
    "error-404": _failure(
        "404, no endpoints", 404, "No endpoints found for this model.", error_type="not_found"
    ),
    "error-404-availability": unavailable(
        "openai/gpt-4o-mini", "no_endpoints", 404, [], "No endpoints found that can serve this request."
    ),
    "error-408": _failure("408, timeout", 408, "Request timed out"),
    "error-413": _failure("413, payload too large", 413, "Payload too large", error_type="payload_too_large"),
    "error-422": _failure("422, unprocessable", 422, "Unprocessable entity", error_type="unprocessable"),
    "error-429": Failure(
        "429 by OpenRouter itself, with X-RateLimit headers",
        429,
        {
            "message": "Rate limit exceeded: free-models-per-min. ",
            "code": 429,
            "metadata": {
                "headers": {
                    "X-RateLimit-Limit": "20",
                    "X-RateLimit-Remaining": "0",
                    "X-RateLimit-Reset": "1765680060000",
                },
                "provider_name": None,
            },
        },
        {"x-ratelimit-limit": "20", "x-ratelimit-remaining": "0", "x-ratelimit-reset": "1765680060000"},
    ),
    "error-429-upstream": Failure(
        "429 by the provider, with Retry-After",
        429,
        {
            "message": "Provider returned error",
            "code": 429,
            "metadata": {
                "raw": "the model is temporarily rate-limited upstream. Please retry shortly.",
                "provider_name": "Decart",
                "is_byok": False,
                "provider_error_code": "upstream_429",
                "limit_source": "upstream_provider_shared_pool",
                "remedy_hint": "Retry later, or add your own key.",
            },
        },
        {"retry-after": "3"},
    ),
    "error-500": _failure("500, masked", 500, "Internal Server Error"),
    "error-502": _failure(
        "502, the provider answered nonsense",
        502,
        "Provider returned error",
        error_type="provider_unavailable",
        provider_name="DeepInfra",
        raw="upstream connect error",
    ),
    "error-503": Failure(
        "503, no provider meets the routing requirements, with Retry-After",
        503,
        {"message": "No available model provider that meets your routing requirements", "code": 503},
        {"retry-after": "7"},
    ),
    "error-503-availability": unavailable(
        "openai/gpt-4o-mini", "temporarily_unavailable", 503, [], "All providers are temporarily unavailable."
    ),
    "error-504": _failure("504, timeout at the provider", 504, "Provider timed out", error_type="timeout"),
    "error-524": _failure("524, timeout at the edge", 524, "A timeout occurred"),
    "error-529": _failure(
        "529, provider overloaded", 529, "Provider is overloaded", error_type="provider_overloaded"
    ),
    "max-price-refused": max_price_excludes("openai/gpt-4o-mini"),
}
