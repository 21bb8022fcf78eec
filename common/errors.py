"""The errors a client can receive: one tree, rendered in one place. No message may contain a secret.

    GatewayError
    ├── BadRequest 400 ── UnboundedCost, ContextLengthExceeded
    ├── InvalidKey 401
    ├── InsufficientCredits 402 ── BudgetExceeded (EndUserBudgetExceeded), TrialExpired
    ├── Forbidden 403 ── IpNotAllowed, DomainNotAllowed, MissingScope, ModelNotAllowed, AccountSuspended,
    │                    KeyExhausted, ProviderKeyRefused, RegistrationClosed
    ├── NotFound 404 ── ModelNotFound, NotOffered
    ├── MethodNotAllowed 405
    ├── Conflict 409 ── IdempotencyConflict, IdempotencyRunning, AnswerNotKept
    ├── BodyTooLarge 413
    ├── RateLimited 429 ── PlanLimitExceeded, ConcurrencyExceeded
    ├── UpstreamError 502 ── UpstreamUnavailable 503, UpstreamTimeout 504, UpstreamRefused 4xx
    └── Unavailable 503 ── DatabaseUnavailable, Misconfigured

A class's docstring is its default message. Clients read it, so it says what is wrong and what to do.
Expected refusals are raised as these classes; a bug stays a plain exception. Anthropic's and OpenRouter's
clients get the same error in the shape they know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

# https://docs.anthropic.com/en/api/errors. Any other status is an invalid_request_error below 500, and an
# api_error above.
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class GatewayError(Exception):
    """Something went wrong on our side. Quote the request id below when you report it."""

    status: int = 500
    type: ClassVar[str] = "api_error"
    code: str = "internal_error"
    # The OpenAI SDK reads this as x-should-retry. None leaves the decision to the SDK's own rules.
    should_retry: ClassVar[bool | None] = None

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
        **details: Any,
    ) -> None:
        self.message = message or " ".join((type(self).__doc__ or "").split())
        super().__init__(self.message)
        self.param = param
        self.code = code or type(self).code
        self.retry_after = retry_after
        self.extra_headers = dict(headers or {})
        self.details = details

    def body(self, request_id: str) -> dict[str, Any]:
        """The envelope of every error response, as JSON-ready values."""
        return {
            "error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code},
            "gateway": {"request_id": request_id, **self.details},
        }

    def openrouter_body(self, request_id: str) -> dict[str, Any]:
        """The same in OpenRouter's form: `code` is the status, and our own code is `metadata.error_type`."""
        body = self.body(request_id)
        error = {**body["error"], "code": self.status, "metadata": {"error_type": self.code}}
        return {**body, "error": error}

    @property
    def anthropic_type(self) -> str:
        """The name that Anthropic's API gives an error of this status."""
        return ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")

    def anthropic_body(self, request_id: str) -> dict[str, Any]:
        """The same in Anthropic's form, with our `param` and `code` beside its own fields."""
        error = {
            "type": self.anthropic_type,
            "message": self.message,
            "param": self.param,
            "code": self.code,
            **self.details,
        }
        return {"type": "error", "error": error, "request_id": request_id}

    def headers(self) -> dict[str, str]:
        """Retry-After and the SDK's retry hint, where they apply."""
        headers = dict(self.extra_headers)
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.should_retry is not None:
            headers["x-should-retry"] = str(self.should_retry).lower()
        return headers


class BadRequest(GatewayError):
    """The request is not valid."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class UnboundedCost(BadRequest):
    """No upper bound of this request's cost is known, so it cannot be admitted on prepaid credits."""

    code = "no_cost_bound"


class ContextLengthExceeded(BadRequest):
    """The request is longer than the model's context window, or than your token limit ever allows."""

    code = "context_length_exceeded"


class InvalidKey(GatewayError):
    """The API key is missing, unknown, revoked or expired. Send it as `Authorization: Bearer gw_...`."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer", **super().headers()}


class InsufficientCredits(GatewayError):
    """Your credits do not cover the upper bound of this request's cost."""

    status = 402
    type = "insufficient_quota"
    code = "insufficient_credits"
    should_retry = False


class BudgetExceeded(InsufficientCredits):
    """The budget of this API key does not cover this request."""

    code = "budget_exceeded"


class EndUserBudgetExceeded(BudgetExceeded):
    """The budget of this end user does not cover this request."""

    code = "end_user_budget_exceeded"


class TrialExpired(InsufficientCredits):
    """The trial has ended. Add credits or subscribe to a plan to continue."""

    code = "trial_expired"


class Forbidden(GatewayError):
    """This API key may not do this."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class IpNotAllowed(Forbidden):
    """This API key may not be used from this network address."""

    code = "ip_not_allowed"


class DomainNotAllowed(Forbidden):
    """This API key may not be used from this domain."""

    code = "domain_not_allowed"


class MissingScope(Forbidden):
    """This API key's scopes do not allow this."""

    code = "missing_scope"


class ModelNotAllowed(Forbidden):
    """This API key or plan does not allow this model."""

    code = "model_not_allowed"


class AccountSuspended(Forbidden):
    """This account is suspended. Contact the operator."""

    code = "account_suspended"


class KeyExhausted(Forbidden):
    """This API key has used up its number of requests (max_requests)."""

    code = "key_request_limit_exceeded"


class ProviderKeyRefused(Forbidden):
    """Your stored OpenRouter key cannot be used. Replace or remove it at /user/provider-key."""

    code = "provider_key_refused"


class RegistrationClosed(Forbidden):
    """Registration is closed. Ask the operator for an account."""

    code = "registration_closed"


class NotFound(GatewayError):
    """There is nothing here."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """This model does not exist. GET /v1/models lists those that do."""

    code = "model_not_found"


class NotOffered(NotFound):
    """This gateway does not offer this."""

    code = "not_offered"


class MethodNotAllowed(GatewayError):
    """This path does not accept this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Conflict(GatewayError):
    """This is already taken."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"
    should_retry = False


class IdempotencyConflict(Conflict):
    """This Idempotency-Key was already used with another request body. Use a new key for a new request."""

    code = "idempotency_key_reused"


class IdempotencyRunning(Conflict):
    """The first request with this Idempotency-Key is still running. Repeat it later to get the response."""

    code = "idempotency_request_running"
    should_retry = True


class AnswerNotKept(Conflict):
    """The first request with this Idempotency-Key was charged, but its response could not be stored.
    With a new key the request runs again and is charged again.
    """

    code = "idempotency_answer_not_kept"


class BodyTooLarge(GatewayError):
    """The request body is too large."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class RateLimited(GatewayError):
    """The rate limit has been reached."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class PlanLimitExceeded(RateLimited):
    """The plan's limit has been reached."""

    code = "plan_limit_exceeded"


class ConcurrencyExceeded(RateLimited):
    """Too many requests are running at the same time. Wait for one to finish."""

    code = "concurrency_limit_exceeded"


class UpstreamError(GatewayError):
    """The model provider failed or sent an unusable response. Nothing was lost on your side; try again."""

    status = 502
    code = "upstream_error"


class UpstreamUnavailable(UpstreamError):
    """The model provider cannot serve this request at the moment."""

    status = 503
    code = "upstream_unavailable"


class UpstreamTimeout(UpstreamError):
    """The model provider did not respond in time."""

    status = 504
    code = "upstream_timeout"


class UpstreamRefused(UpstreamError):
    """The model provider refused the request."""

    code = "upstream_refused"

    def __init__(self, message: str | None = None, *, status: int, **rest: Any) -> None:
        super().__init__(message, **rest)
        self.status = status

    def body(self, request_id: str) -> dict[str, Any]:
        # `type` is a class attribute, and this class alone has a status that is known only at run time.
        body = super().body(request_id)
        body["error"]["type"] = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return body


class Unavailable(GatewayError):
    """The gateway cannot serve requests at the moment."""

    status = 503
    code = "unavailable"
    anthropic_type = "api_error"  # overloaded_error would blame the model


class DatabaseUnavailable(Unavailable):
    """The gateway's database does not respond. No model was called and nothing was charged; try again."""

    code = "database_unavailable"


class Misconfigured(Unavailable):
    """The gateway is not configured correctly."""

    code = "misconfigured"
    should_retry = False
