"""What rows of every kind have in common: outcomes, the values of columns, and who acts.

Amounts are nano-dollars everywhere. Times are text, ISO 8601 with an offset; ids of requests are UUIDs as
text. Every outcome of an SQL function is in the type of its answer: a test compares them with the SQL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, TypedDict, TypeVar

OutcomeT = TypeVar("OutcomeT", bound=str)
Mode = Literal["sandbox", "live"]
Environment = Literal["live", "test", "staging", "development"]
Role = Literal["user", "admin"]
Window = Literal["day", "week", "month", "lifetime"]
Scopes = dict[str, list[str]]


class Done(TypedDict, Generic[OutcomeT]):
    """It is done, and there is nothing more to say."""

    outcome: OutcomeT


class Refused(TypedDict, Generic[OutcomeT]):
    """It is not done; the outcome is the reason."""

    outcome: OutcomeT


class AdminStamp(TypedDict):
    """Who did it, and from where: every change is recorded with it. `address` is that of the client."""

    actor: str
    address: str
    user_agent: str | None
    request_id: str


class CallerStamp(AdminStamp):
    """A user who acts, and the key that they act with: it may have been revoked since it was verified."""

    user_id: int
    maker_id: int


class Target(TypedDict):
    """Whom an administrator means: a user by id, or the owner of the key with one of these HMACs."""

    user_id: int | None
    hashes: Sequence[str]


def columns_of(row: type[object]) -> str:
    """The columns to select for a row of this type: its fields, and no secret that stands beside them."""
    return ",".join(row.__annotations__)
