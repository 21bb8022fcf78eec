"""Outcome: what is known of how a request ended; the client's side of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from common.errors import GatewayError
from gateway.proxy.dialects.base import AnswerState
from gateway.upstream.usage import Usage


class Client(Protocol):
    """Whoever waits for the answer."""

    gone: bool

    async def start(self, status: int, headers: Mapping[str, str]) -> None: ...

    async def send(self, data: bytes, *, more: bool) -> None: ...


@dataclass(slots=True)
class Outcome:
    """What is known of how the request ended, as it becomes known."""

    completed: bool = False
    usage: Usage | None = None
    failure: GatewayError | None = None
    # The upstream refused before generating: it has said all there is, and bills nothing.
    refused: bool = False
    generation_id: str | None = None
    finish_reason: str | None = None
    model: str | None = None
    provider: str | None = None
    first_token_ms: int | None = None

    def learn(self, state: AnswerState) -> None:
        """Takes over what the answer says of itself."""
        self.usage, self.finish_reason, self.model, self.provider = (
            state.usage,
            state.finish_reason,
            state.model,
            state.provider,
        )
