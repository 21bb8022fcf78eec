"""StreamState, EventAction: what every dialect reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from gateway.upstream.usage import Usage, read_text

Sanitise = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(slots=True, kw_only=True)
class AnswerState:
    """What an answer has said of itself so far."""

    usage: Usage | None = None
    error: dict[str, Any] | None = None
    body_id: str | None = None
    model: str | None = None
    provider: str | None = None
    finish_reason: str | None = None
    ended: bool = False  # the event that ends a stream in this dialect has come
    choices: int = 1  # that were asked for
    ended_choices: set[str] = field(default_factory=set)
    counts: dict[str, Any] = field(default_factory=dict)  # a usage object that comes in parts
    latest: bytes = b""  # the piece of a stream that came last, of those whose events are numbered


class EventAction(Enum):
    """What happens to an event of a stream."""

    PASS = auto()  # released to the client, after the held event
    PASS_BESIDE = auto()  # released to the client while the held event stays held
    HOLD = auto()  # held until the settlement, or until the next event
    TRAIL = auto()  # follows the held event when that is released, or waits in its place


def note_origin(answer: Mapping[str, Any], state: AnswerState) -> None:
    state.body_id = state.body_id or read_text(answer.get("id"))
    state.model = read_text(answer.get("model")) or state.model
    state.provider = read_text(answer.get("provider")) or state.provider


def as_object(error: object) -> Mapping[str, Any]:
    return error if isinstance(error, dict) else {"message": str(error)}
