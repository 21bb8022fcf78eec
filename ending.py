"""What does one proxied request consist of, and what is known of how it ended?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dialects import Said
from endpoints import Endpoint
from errors import GatewayError
from security import Credential
from usage import Usage


class Client(Protocol):
    """Whoever waits for the answer."""

    gone: bool

    async def start(self, status: int, headers: Mapping[str, str]) -> None: ...

    async def send(self, data: bytes, *, more: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Proxied:
    """One request as it arrived: where to, from whom, and its raw body."""

    endpoint: Endpoint
    credential: Credential
    body: bytes
    request_id: str
    content_type: str = ""
    client_request_id: str | None = None
    scenario: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Ending:
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

    def learn(self, said: Said) -> None:
        """Takes over what the answer says of itself."""
        self.usage, self.finish_reason, self.model, self.provider = said.usage, said.finish_reason, said.model, said.provider
