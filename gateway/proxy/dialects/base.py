"""What all dialects share: the state of an answer, what happens to an event, and the end of a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from common.errors import GatewayError
from common.json_types import Json, JsonObject
from gateway.upstream.usage import Usage, read_text

# Turns an upstream's `error` object into one that clients may see: it has `message` and `code` at least.
Sanitise = Callable[[JsonObject], dict[str, Json]]


@dataclass(slots=True, kw_only=True)
class AnswerState:
    """What an answer has said of itself so far."""

    usage: Usage | None = None
    error: dict[str, Json] | None = None  # sanitised
    body_id: str | None = None
    model: str | None = None
    provider: str | None = None
    finish_reason: str | None = None
    ended: bool = False  # the event that ends a stream in this dialect has come
    choices: int = 1  # that the request asks for
    ended_choices: set[str] = field(default_factory=set)
    counts: dict[str, Json] = field(default_factory=dict)  # a usage object that comes in parts
    latest: bytes = b""  # the latest chunk of a stream whose events are numbered


class EventAction(Enum):
    """What happens to an event of a stream."""

    PASS = auto()  # released to the client, after the held event
    PASS_BESIDE = auto()  # released to the client while the held event stays held
    HOLD = auto()  # held until the settlement, or until the next event
    TRAIL = auto()  # follows the held event when that is released; held itself where none is


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """What the last bytes of a stream are made of, once the request is settled."""

    held: bytes | None  # the event with the bill
    trailing: bytes  # what follows it, from the upstream
    gateway_usage: bytes  # the charge, a JSON object
    failure: GatewayError | None
    request_id: str


def note_origin(answer: JsonObject, state: AnswerState) -> None:
    """Notes the first id, and the latest model and provider: a fallback may have taken over."""
    state.body_id = state.body_id or read_text(answer.get("id"))
    state.model = read_text(answer.get("model")) or state.model
    state.provider = read_text(answer.get("provider")) or state.provider


def as_object(error: Json) -> JsonObject:
    """The value of an `error` field as an object: some providers write a text."""
    return error if isinstance(error, dict) else {"message": str(error)}
