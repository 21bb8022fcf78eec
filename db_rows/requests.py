"""Admission and settlement: what a request sends to the database, and every answer that it can get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, NotRequired, TypedDict

from db_rows.shared import Environment, Mode, OutcomeT, Role, Scopes

# Admission. One item per request, one answer per item, both named by `request_id`.


class SlotItem(TypedDict):
    """Where an answer is stored. Without `ttl_seconds` the key's own cache_ttl_seconds applies; `clear`
    removes what is there first.
    """

    place: str
    fingerprint: str
    ttl_seconds: NotRequired[int]
    clear: NotRequired[bool]


class PriceBasis(TypedDict):
    """What a hold was computed from, without markup; `max_price` as it is sent. For the receipt."""

    fixed_nanos: str
    output_nanos: str
    max_price: dict[str, str]


class BoundItem(TypedDict):
    """What a request can cost: decimals in plain notation, nano-dollars without markup."""

    fixed_nanos: str
    output_nanos: str
    min_output: int
    max_output: int


class QuoteItem(BoundItem):
    models: Sequence[str]
    prompt_estimate: int
    markup: str


class VerificationItem(TypedDict):
    """A key that is to be verified, and for what; `holds` False."""

    request_id: str
    hashes: Sequence[str]
    secret_id: str
    legacy_hash: str | None
    prefix_environment: str | None
    verb: str
    resource: str
    address: str
    domain: str | None
    user_agent: str | None
    mode: Mode
    markup: str
    ttl_seconds: int
    holds: bool
    resent: bool
    byok: bool


class AdmissionOptions(TypedDict):
    """What only some requests ask of admission; absent where they do not."""

    end_user: NotRequired[str]
    price_basis: NotRequired[PriceBasis]
    idempotency: NotRequired[SlotItem | None]
    cache: NotRequired[SlotItem]


class AdmissionItem(VerificationItem, BoundItem, AdmissionOptions):
    """A request that is to be admitted; `holds` True."""

    client_request_id: str | None
    endpoint: str
    streamed: bool
    models: Sequence[str]
    prompt_estimate: int


class LimitsLeft(TypedDict, total=False):
    """The tightest limits: how much of them is left, and the seconds until they are whole again. Empty where
    an answer is repeated, None where nothing is limited.
    """

    request_limit: int | None
    request_left: int | None
    request_reset: int | None
    token_limit: int | None
    token_left: int | None
    token_reset: int | None


class ExpiredHold(TypedDict):
    """A pending request whose hold has outlived its time. `provider_key`: encrypted, None where the request
    went out under the operator's key, or the user has none any more.
    """

    request_id: str
    generation_id: str | None
    mode: Mode
    environment: Environment
    byok: bool
    provider_key: str | None


class RequestOutcome(TypedDict, Generic[OutcomeT]):
    """The outcome of one item, where there is nothing more to say."""

    outcome: OutcomeT
    request_id: str


Busy = RequestOutcome[Literal["busy"]]  # the user is locked elsewhere: the item is to be sent again
UnknownRequest = RequestOutcome[
    Literal["unknown"]
]  # no such request, or, for a larger hold, it is not running
WrongMode = RequestOutcome[Literal["wrong_mode"]]  # another instance took the database live
IdentityRefused = RequestOutcome[
    Literal[
        "INVALID_KEY",
        "INACTIVE_KEY",
        "EXPIRED_KEY",
        "IP_NOT_ALLOWED",
        "DOMAIN_NOT_ALLOWED",
        "SCOPE_NOT_ALLOWED",
        "MODEL_NOT_ALLOWED",
        "ACCOUNT_SUSPENDED",
        "REQUEST_LIMIT_EXCEEDED",
        "trial_expired",
    ]
]


class Failed(TypedDict):
    """The item raised in the database; the others of its batch did not suffer."""

    outcome: Literal["failed"]
    request_id: str
    sqlstate: str
    message: str


class KeyAnswer(TypedDict):
    request_id: str
    user_id: int
    key_id: int
    environment: Environment


class Verified(KeyAnswer):
    """`outdated`: the secret was replaced, and is in its grace period."""

    outcome: Literal["verified"]
    role: Role
    outdated: bool
    key_name: str
    key_prefix: str
    last4: str
    scopes: Scopes
    limits: LimitsLeft


class Admitted(KeyAnswer):
    """A hold. `byok`: it holds nothing, and goes out under the user's own `provider_key` (encrypted).
    `cache_ttl`: seconds for which its answer may be cached.
    """

    outcome: Literal["admitted"]
    granted_output: int
    hold_nanos: int
    balance_nanos: int
    limits: LimitsLeft
    byok: NotRequired[bool]
    provider_key: NotRequired[str | None]
    cache_ttl: NotRequired[int]


class StoredAnswerRow(KeyAnswer):
    """An answer that was given before, sealed, and what it was charged; `age` in seconds."""

    original_request_id: str
    cost_nanos: int
    balance_after_nanos: int
    answer: str
    age: int


class Cached(StoredAnswerRow):
    """From the response cache, which costs nothing."""

    outcome: Literal["cached"]
    limits: LimitsLeft


class Replayed(StoredAnswerRow):
    """Of the first request with this idempotency key."""

    outcome: Literal["replayed"]
    tokens: int


class LimitRefused(TypedDict):
    """A limit is reached. `window`: second, minute, hour, day, plan day, plan month or concurrency; `unit` is
    None for concurrency; `never`: no waiting helps; `expired`: holds to be resolved first.
    """

    outcome: Literal["rate_limit", "plan_limit", "concurrency"]
    request_id: str
    window: str
    unit: Literal["requests", "tokens"] | None
    limit: int
    need: int
    never: bool
    retry_after: int
    limits: LimitsLeft
    expired: list[ExpiredHold] | None


class MoneyRefused(TypedDict):
    """The least of credits, key budget and end user's budget does not cover the smallest answer."""

    outcome: Literal["credits", "budget", "end_user_budget"]
    request_id: str
    needed_nanos: int
    available_nanos: int
    balance_nanos: int
    held_nanos: int
    affordable_output: int
    limits: NotRequired[LimitsLeft]
    expired: NotRequired[list[ExpiredHold] | None]


class IdempotencyRefused(TypedDict):
    """The key belongs to another body, or to a request that was charged and whose answer was not kept."""

    outcome: Literal["idempotency_conflict", "idempotency_not_kept"]
    request_id: str
    original_request_id: str
    cost_nanos: int


class IdempotencyPending(TypedDict):
    """The first request with this idempotency key is running; `expired`: its instance seems to be gone."""

    outcome: Literal["idempotency_running"]
    request_id: str
    original_request_id: str
    cost_nanos: int
    retry_after: int
    expired: list[ExpiredHold] | None


AdmissionRefusal = (
    IdentityRefused
    | LimitRefused
    | MoneyRefused
    | IdempotencyRefused
    | IdempotencyPending
    | WrongMode
    | Failed
)
AdmissionVerdict = Verified | Admitted | Cached | Replayed | AdmissionRefusal
AdmissionAnswer = AdmissionVerdict | Busy


# A running request: a larger hold, the id of its generation, its end.


class RaiseItem(BoundItem):
    request_id: str
    price_basis: PriceBasis | None


class Raised(TypedDict):
    outcome: Literal["raised"]
    request_id: str
    granted_output: int
    hold_nanos: int
    balance_nanos: int


class GenerationNote(TypedDict):
    request_id: str
    generation_id: str


RaiseVerdict = Raised | MoneyRefused | UnknownRequest | Failed
RaiseAnswer = RaiseVerdict | Busy
NoteAnswer = RequestOutcome[Literal["noted", "settled", "busy", "failed"]]
SettlementStatus = Literal["completed", "failed", "cancelled", "expired"]
SettlementSource = Literal["usage", "generation", "none"]


class SettlementDetails(TypedDict):
    """What is known of a request's end beside its usage; absent where it is not known or not asked for.

    `stored_answer` (sealed) is stored for the request's idempotency key, and at `cache`.
    """

    model_used: NotRequired[str | None]
    provider: NotRequired[str | None]
    finish_reason: NotRequired[str | None]
    error_code: NotRequired[str | None]
    latency_ms: NotRequired[int | None]
    time_to_first_token_ms: NotRequired[int | None]
    generation_id: NotRequired[str | None]
    stored_answer: NotRequired[str]
    cache: NotRequired[SlotItem | None]


class SettlementItem(SettlementDetails):
    """The end of a request."""

    request_id: str
    status: SettlementStatus
    source: SettlementSource
    billable_nanos: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None


class Settled(TypedDict):
    """What was charged; of `repeated` by the first settlement, which stands."""

    outcome: Literal["settled", "repeated"]
    request_id: str
    user_id: int
    status: SettlementStatus
    cost_nanos: int
    overrun_nanos: int
    balance_nanos: int


SettlementVerdict = Settled | UnknownRequest | Failed
SettlementAnswer = SettlementVerdict | Busy
