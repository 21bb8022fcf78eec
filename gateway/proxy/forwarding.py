"""Sends an admitted request upstream and relays the answer, whether plain, binary or streamed, but for its
end.

The end waits for the settlement (gateway/proxy/charging.py). The request is sent once: again only where the
upstream refused it for its price before it generated anything.
"""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import aclosing
from dataclasses import dataclass, field

from common.errors import GatewayError, ProviderKeyRefused, UpstreamError, UpstreamTimeout
from gateway.proxy.admitted_request import AdmittedRequest
from gateway.proxy.beta_headers import beta_headers
from gateway.proxy.dialects.base import AnswerState
from gateway.proxy.dialects.chat import Dialect
from gateway.proxy.outcome import Client, Outcome
from gateway.proxy.repricing import reprice
from gateway.proxy.request import write_request
from gateway.proxy.response_headers import response_headers
from gateway.proxy.response_writer import ResponseWriter
from gateway.proxy.services import Services
from gateway.proxy.sse import BOM
from gateway.proxy.stream import EventTooLarge, Stream
from gateway.upstream.client import Unreachable
from gateway.upstream.errors import (
    RequestOrigin,
    error_from_upstream,
    error_status,
    is_price_change,
    sanitised_error,
)
from gateway.upstream.providers import stops_on_abort
from gateway.upstream.response import UpstreamResponse
from gateway.upstream.usage import parse_json, read_generation_id

NOTE_GENERATION_SECONDS = 2.0
BINARY = re.compile(r"audio/[a-z0-9.+-]+(?:; ?[a-z]+=[a-z0-9]+)*|application/octet-stream", re.IGNORECASE)
ANY_BINARY = "application/octet-stream"


@dataclass(slots=True)
class Forwarding:
    """One admitted request at the upstream. `outcome` says at any moment what is known of it."""

    admitted: AdmittedRequest
    services: Services
    client: Client
    writer: ResponseWriter
    outcome: Outcome = field(default_factory=Outcome)
    _relaying: asyncio.Task[object] | None = None  # only while a stream is read may its task be cancelled
    _timers: list[asyncio.TimerHandle] = field(default_factory=list)

    async def run(self) -> Outcome:
        """Forwards the request and relays the answer; a failure is part of the outcome, and is not raised."""
        deadline = self.services.settings.deadline_seconds
        if self.client.gone:
            self.outcome.refused = True  # by its own client: nothing is sent
            return self.outcome
        try:
            # The deadline counts from the request's arrival: the hold outlives it by a minute.
            async with asyncio.timeout(deadline - (time.monotonic() - self.admitted.started)):
                await self._send_at_current_prices()
        except TimeoutError:
            self.outcome.failure = UpstreamTimeout(f"The request took longer than {deadline:g} seconds.")
        except GatewayError as failure:
            self.outcome.failure = failure
            # Nothing was sent, so nothing can be billed.
            self.outcome.refused = self.outcome.refused or isinstance(failure, Unreachable)
        except EventTooLarge:
            self.outcome.failure = UpstreamError("The model provider's answer is too large.")
        except asyncio.CancelledError:
            if not self._is_own_abort():
                raise
        finally:
            self._relaying = None
        return self.outcome

    def client_left(self) -> None:
        """Stops the upstream where closing the connection stops the bill; else the answer is read to its end,
        to learn what it cost.
        """
        if self._relaying is not None and self._may_abort():
            self._relaying.cancel()

    def forget_generation(self) -> None:
        """The request has ended: its generation id need not be stored any more."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _is_own_abort(self) -> bool:
        """Whether `client_left` cancelled the relay: then the task goes on, to settle. A cancellation from
        outside ends the task.
        """
        task = asyncio.current_task()
        if not self.client.gone or self._relaying is None or task is None:
            return False
        task.uncancel()
        return True

    async def _send_at_current_prices(self) -> None:
        """Sends the request; once more where prices have changed and the larger hold is granted."""
        try:
            await self._send()
        except GatewayError as refusal:
            if not is_price_change(refusal):
                raise
            raised = await reprice(self.admitted, self.services)
            if not raised or self.client.gone:
                raise
            # The refused attempt has ended: what is learned from now on is of the second one.
            self.outcome.refused, self.outcome.generation_id = False, None
            self.forget_generation()
            await self._send()

    async def _send(self) -> None:
        endpoint = self.admitted.incoming.endpoint
        body, headers = self._request()
        response = await self.services.upstream.send(
            "/" + endpoint.name, body, headers, api_key=self._own_key()
        )
        try:
            self._learn_generation(response.generation_id)
            if response.status != 200:
                await self._raise_refusal(response)
            elif response.is_stream:
                await self._relay_stream(response)
            elif endpoint.answers_bytes and not response.is_json:
                await self._relay_binary(response)
            else:
                raw = await response.read()
                self.outcome.body = read_answer(raw, endpoint.dialect, self.outcome, self._origin())
        finally:
            await response.aclose()

    def _request(self) -> tuple[bytes, dict[str, str]]:
        admitted, incoming = self.admitted, self.admitted.incoming
        user_id, keyring = admitted.hold.user_id, self.services.keyring
        body, headers = write_request(
            incoming.endpoint,
            admitted.parsed,
            admitted.bound.apply(admitted.hold.granted_output),
            lambda text: keyring.tenant_pseudonym(user_id, text),
        )
        scenario = incoming.scenario
        if scenario and scenario.isascii() and self.services.upstream.is_sandbox:
            headers = {**headers, "x-sandbox-scenario": scenario}
        return body, {**headers, **beta_headers(incoming.headers)}

    def _own_key(self) -> str | None:
        """The user's own upstream key, where the request is sent under it. Raises ProviderKeyRefused where it
        cannot be read: such a request is never sent under the operator's key instead.
        """
        hold = self.admitted.hold
        if not hold.byok:
            return None
        key = self.services.vault.decrypt(hold.provider_key) if hold.provider_key is not None else None
        if key is None:
            self.outcome.refused = True
            raise ProviderKeyRefused(
                "The OpenRouter key that you have stored cannot be read any more. "
                "Store it anew: /user/provider-key."
            )
        return key

    def _origin(self) -> RequestOrigin:
        return RequestOrigin(self.services.upstream.is_sandbox, self.admitted.hold.byok)

    async def _raise_refusal(self, response: UpstreamResponse) -> None:
        self.outcome.refused = response.is_refusal
        bound, hold = self.admitted.bound, self.admitted.hold
        origin = RequestOrigin(self.services.upstream.is_sandbox, hold.byok, bound.client_caps_price)
        raise error_from_upstream(response.status, response.headers, await response.read(), origin)

    async def _relay_stream(self, response: UpstreamResponse) -> None:
        dialect, choices = self.admitted.incoming.endpoint.dialect, self.admitted.bound.choices
        stream = self.outcome.stream = Stream(sanitised_error, dialect, choices=choices)
        writer = self.writer
        self._relaying = asyncio.current_task()
        async with aclosing(response.chunks()) as chunks:
            async for chunk in chunks:
                passed = stream.feed(chunk)
                self._learn_progress(stream)
                # The headers wait for the first chunk: until then an error can still be answered with its
                # status.
                if not writer.started:
                    await writer.start_stream(self._headers())
                await writer.send(passed)
                if stream.done or (self.client.gone and self._may_abort()):
                    break
        if not writer.started:
            await writer.start_stream(self._headers())
        await writer.send(stream.end())
        # From here on a client that leaves must not cancel anything: the cost is known, and is settled next.
        self._relaying = None
        self.outcome.completed = stream.is_whole and not stream.has_failed
        if not stream.is_whole and stream.error is None and not self.client.gone:
            raise UpstreamError("The model provider's answer ended too early.")

    def _learn_progress(self, stream: Stream) -> None:
        outcome = self.outcome
        if stream.data_events and outcome.first_token_ms is None:
            outcome.first_token_ms = self.admitted.elapsed_ms
        if outcome.generation_id is None and stream.body_id is not None:
            self._learn_generation(read_generation_id(stream.body_id))

    async def _relay_binary(self, response: UpstreamResponse) -> None:
        """Passes the pieces on as they come; the last one waits for the settlement."""
        outcome, writer = self.outcome, self.writer
        outcome.content_type = binary_type(response.headers.get("content-type"))
        async with aclosing(response.chunks()) as chunks:
            async for chunk in chunks:
                if outcome.body is None:
                    outcome.first_token_ms = self.admitted.elapsed_ms
                elif not writer.started:
                    # A second piece has come: the first is not the last, and may go.
                    await writer.start({**self._headers(), "content-type": outcome.content_type})
                await writer.send(outcome.body or b"")
                outcome.body = chunk
        if outcome.body is None:
            raise UpstreamError("The model provider's answer is empty.")
        outcome.completed = True

    def _headers(self) -> dict[str, str]:
        return {**response_headers(self.admitted, self.outcome), **self.services.mode_headers}

    def _may_abort(self) -> bool:
        stream = self.outcome.stream
        return stream is not None and stops_on_abort(stream.provider)

    def _learn_generation(self, generation_id: str | None) -> None:
        """Has the generation id of a request that is still running in two seconds stored, so that any
        instance can finish it should this one die. Shorter requests save the round trip.
        """
        self.outcome.generation_id = generation_id
        if generation_id is not None:
            note, request_id = self.services.settlements.note_generation, self.admitted.hold.request_id
            later = asyncio.get_running_loop().call_later
            self._timers.append(later(NOTE_GENERATION_SECONDS, note, request_id, generation_id))


def read_answer(raw: bytes, dialect: Dialect, outcome: Outcome, origin: RequestOrigin) -> bytes:
    """A whole answer as the client gets it: the same bytes unless something must be hidden. Notes in
    `outcome` what it says of itself.

    Raises UpstreamError for what is no JSON object, and the GatewayError that an error in it means (see
    `error_from_upstream`).
    """
    # Some middlemen put a byte order mark in front, which JSON forbids.
    raw = raw.removeprefix(BOM)
    try:
        data = parse_json(raw)
    except ValueError:
        raise UpstreamError("The model provider's answer is not JSON.") from None
    if not isinstance(data, dict):
        raise UpstreamError("The model provider's answer is not a JSON object.")
    state = AnswerState()
    dialect.read(data, state, sanitised_error)
    outcome.learn(state)
    outcome.generation_id = outcome.generation_id or read_generation_id(data.get("id"))
    if dialect.is_error(data):
        error = data.get("error")
        status = error_status(dialect.with_status(error)) if isinstance(error, dict) else None
        raise error_from_upstream(status or 502, {}, raw, origin)
    outcome.completed = not dialect.has_failed(state)
    return dialect.without_secrets(raw, sanitised_error)


def binary_type(content_type: str | None) -> str:
    """The content type of a binary answer. Raises UpstreamError for one that is not sound."""
    if content_type is None:
        return ANY_BINARY
    if not BINARY.fullmatch(content_type):
        raise UpstreamError("The model provider's answer is not audio.")
    return content_type
