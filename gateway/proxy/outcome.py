"""What is known of how a request ended, as it becomes known, and the client's side of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from common.errors import GatewayError
from gateway.proxy.dialects.base import AnswerState
from gateway.proxy.stream import Stream
from gateway.upstream.usage import Usage

JSON = "application/json"


class Client(Protocol):
    """Whoever waits for the answer. `gone`: nobody does any more."""

    gone: bool

    async def start(self, status: int, headers: Mapping[str, str]) -> None: ...

    async def send(self, data: bytes, *, more: bool) -> None: ...


@dataclass(slots=True)
class Outcome:
    """What the upstream answered, and how that ended.

    An answer is a `stream` of events, or `body`: a whole answer, or the last piece of a binary one. It stays
    here until the settlement is known, since the end of an answer tells the client what was charged.
    """

    completed: bool = False
    usage: Usage | None = None
    failure: GatewayError | None = None
    # The upstream refused before generating: nothing more will come, and nothing is billed.
    refused: bool = False
    generation_id: str | None = None
    finish_reason: str | None = None
    model: str | None = None
    provider: str | None = None
    first_token_ms: int | None = None
    stream: Stream | None = None
    body: bytes | None = None
    content_type: str = JSON

    def learn(self, state: AnswerState) -> None:
        """Takes over what the answer says of itself."""
        self.usage, self.finish_reason = state.usage, state.finish_reason
        self.model, self.provider = state.model, state.provider

    @property
    def has_final_usage(self) -> bool:
        """False where usage may be a running count: in a stream that broke off."""
        return self.stream is None or self.stream.is_whole

    @property
    def total_tokens(self) -> int:
        return self.usage.total_tokens if self.usage else 0
