"""One proxied request from its body to its settlement: read, bound, admit, forward, charge.

From admission on the request has a hold, and it is settled on every ending: an answer, an error, a timeout, a
client that leaves before the first byte or in mid-stream, a shutdown. The work runs in a task of its own, so
that a client that leaves cannot cancel it half-way, and nothing relies on a generator having started.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from common.errors import GatewayError
from gateway.billing.admission import AdmissionRequest
from gateway.billing.hold import StoredReply
from gateway.billing.stored_answers import Recording
from gateway.pricing.upper_bound import Bound
from gateway.proxy.admitted_request import AdmittedRequest, bound_with
from gateway.proxy.charging import Charging
from gateway.proxy.forwarding import Forwarding
from gateway.proxy.idempotency_and_cache import ReplayOptions, read_replay_options, send_stored_answer
from gateway.proxy.outcome import Client
from gateway.proxy.request import IncomingRequest, ParsedRequest, end_user_of, read_request
from gateway.proxy.response_writer import ResponseWriter
from gateway.proxy.services import Services


class Exchange:
    """A request that is not admitted yet. `admitted` and `replayed` say what became of it."""

    def __init__(self, services: Services, request: IncomingRequest, client: Client) -> None:
        self.request = request
        self.client = client
        self.admitted: AdmittedExchange | None = None
        self.replayed: StoredReply | None = None
        self._services = services
        self._started = time.monotonic()
        self._is_verified = False

    async def run(self) -> None:
        """Does all of it. Raises GatewayError only while no byte of an answer has been sent; a hold is
        settled then, too.
        """
        # Everything that can be refused without holding money is refused before the hold.
        bounded = await self._read_and_bound()
        credential = self.request.credential
        answer = await self._services.admission.admit(credential, self._admission_request(bounded))
        if isinstance(answer, StoredReply):
            self.replayed = answer
            if not self.client.gone:
                await send_stored_answer(answer, self.client, self._services.mode_headers)
            return
        request = AdmittedRequest(self.request, bounded.parsed, bounded.bound, answer, self._started)
        is_recorded = bounded.replay.idempotency is not None or answer.cache is not None
        self.admitted = AdmittedExchange(request, self._services, self.client, is_recorded=is_recorded)
        await self.admitted.run()

    def client_left(self) -> None:
        """Nobody waits for the answer any more."""
        self.client.gone = True
        if self.admitted is not None:
            self.admitted.forwarding.client_left()

    async def _read_and_bound(self) -> _BoundedRequest:
        """Reads and bounds the body. Only a caller whose key is right is told what is wrong with it, and only
        such a caller makes us fetch a model list.
        """
        services, request = self._services, self.request
        # A body takes far longer to read than a key to look up: unknown keys must not keep this process busy.
        if services.admission.is_suspect(request.credential):
            await self._verify()
        try:
            parsed = read_request(request.endpoint, request.body, request.content_type)
            replay = read_replay_options(request, parsed, services)
            end_user = end_user_of(request.endpoint, parsed.fields, request.headers.get("x-end-user"))
            bound = await self._bound_now(parsed) if services.catalog.is_fresh else None
        except GatewayError:
            await self._verify()
            raise
        if bound is None:
            await self._verify()
            bound = await self._bound_now(parsed)
        return _BoundedRequest(parsed, bound, replay, end_user)

    async def _bound_now(self, parsed: ParsedRequest) -> Bound:
        models = await self._services.catalog.models()
        return bound_with(models, self._services, self.request, parsed)

    async def _verify(self) -> None:
        if not self._is_verified:
            request, resource = self.request, self.request.endpoint.resource
            await self._services.admission.verify(
                request.credential, request_id=request.request_id, verb="write", resource=resource
            )
            self._is_verified = True

    def _admission_request(self, bounded: _BoundedRequest) -> AdmissionRequest:
        request, replay = self.request, bounded.replay
        return AdmissionRequest(
            request_id=request.request_id,
            client_request_id=request.client_request_id,
            endpoint=request.endpoint.name,
            resource=request.endpoint.resource,
            streamed=bounded.parsed.is_streamed,
            bound=bounded.bound,
            end_user=bounded.end_user,
            price_basis=bounded.bound.price_basis,
            idempotency=replay.idempotency,
            cache=replay.cache,
            default_cache=replay.default_cache,
        )


@dataclass(frozen=True, slots=True)
class _BoundedRequest:
    """A request that was read, with what it can cost at most."""

    parsed: ParsedRequest
    bound: Bound
    replay: ReplayOptions
    end_user: str | None


class AdmittedExchange:
    """A request with a hold, to its settlement. `is_recorded`: its answer is to be stored."""

    def __init__(
        self, request: AdmittedRequest, services: Services, client: Client, *, is_recorded: bool
    ) -> None:
        self.request = request
        self._settlements = services.settlements
        self._writer = ResponseWriter(client, services.settlements.spawn, services.keep_alive_seconds)
        if is_recorded:
            self._writer.recording = Recording()
        # They share the outcome: a settlement that interrupts the forwarding charges what is known by then.
        self.forwarding = Forwarding(request, services, client, self._writer)
        self.charging = Charging(request, services, client, self._writer, self.forwarding.outcome)

    async def run(self) -> None:
        """Forwards, settles, and sends the end. The settlement happens whatever interrupts this."""
        try:
            await self.forwarding.run()
            await self.charging.settle()
        except BaseException:
            # Also where the settlement itself was cancelled: settling twice is harmless, not settling is not.
            name = f"settlement of {self.request.hold.request_id}"
            self._settlements.spawn(self.charging.settle(), name)
            raise
        finally:
            self._writer.stop_keep_alives()
            self.forwarding.forget_generation()
        await self.charging.send_end()
