"""Exchange: one proxied request, bound to settlement, on every outcome. Bound, admit, forward, relay, settle.

From admission on this module owns the hold, and settles it on every outcome: answer, error, timeout, a client
that leaves before the first byte or in mid-stream, shutdown. The work runs in a task of its own, so that no
client's leaving cancels it half-way, and nothing relies on a generator having started.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from common.errors import GatewayError, ProviderKeyRefused, UpstreamError, UpstreamTimeout
from gateway.billing.admission import AdmissionRequest
from gateway.billing.hold import Hold, StoredReply
from gateway.billing.rate_limit_headers import limit_headers
from gateway.billing.settlement import settlement, with_generation
from gateway.billing.stored_answers import CHARGE_MARK, Recording
from gateway.pricing.catalog import ModelIndex
from gateway.pricing.upper_bound import Bound, BoundPolicy, bound_request
from gateway.proxy.beta_headers import beta_headers
from gateway.proxy.charge_report import charge_headers, gateway_usage
from gateway.proxy.forwarding import bytes_type, read_answer
from gateway.proxy.outcome import Client, Outcome
from gateway.proxy.replay import (
    EVENTS,
    MISS,
    ReplayOptions,
    read_replay_options,
    seal_answer,
    send_stored_answer,
)
from gateway.proxy.repricing import reprice
from gateway.proxy.request import IncomingRequest, ParsedRequest, end_user_of, read_request, write_request
from gateway.proxy.response_writer import ResponseWriter
from gateway.proxy.sse import with_field
from gateway.proxy.stream import EventTooLarge, Stream
from gateway.runtime.instance import Runtime
from gateway.upstream.client import Unreachable, Upstream
from gateway.upstream.errors import RequestOrigin, error_from_upstream, is_price_change, sanitised_error
from gateway.upstream.providers import stops_on_abort
from gateway.upstream.response import UpstreamResponse
from gateway.upstream.usage import Usage, read_generation_id, read_text

NOTE_GENERATION_SECONDS = 2.0
NOTHING_USED = Usage(prompt_tokens=0, completion_tokens=0, cost=Decimal(0))


@dataclass(slots=True)
class Exchange:
    """One proxied request on its way. `run` is awaited in a task of its own; `client_left` tells it that
    nobody waits any more.
    """

    runtime: Runtime
    request: IncomingRequest
    client: Client
    started: float = field(default_factory=time.monotonic)
    outcome: Outcome = field(default_factory=Outcome)
    settled: dict[str, Any] | None = None
    hold: Hold | None = None
    _upstream: Upstream = field(init=False)
    _asked: ParsedRequest = field(init=False)
    _bound: Bound = field(init=False)
    _replay: ReplayOptions = field(init=False)
    _verified: bool = False
    _end_user: str | None = None
    _writer: ResponseWriter = field(init=False)
    _plain: bytes | None = None  # a whole answer, or the last piece of one in bytes
    _content_type: str = "application/json"
    _stream: Stream | None = None
    _reader: asyncio.Task[Any] | None = None
    _timers: list[asyncio.TimerHandle] = field(default_factory=list)
    _sealing: asyncio.Task[dict[str, Any]] | None = None

    async def run(self) -> None:
        """Does all of it. Raises GatewayError only while no byte of an answer has been sent; the hold is
        settled then, too.
        """
        self._upstream = self.runtime.upstream(self.request.credential.environment)
        self._writer = ResponseWriter(
            self.client, self.runtime.settlements.spawn, self.runtime.keep_alive_seconds
        )
        await self._read_and_bound()
        admitted = await self.runtime.admission.admit(self.request.credential, self._order())
        if isinstance(admitted, StoredReply):
            await self._give_again(admitted)
            return
        hold = self.hold = admitted
        if self._replay.idempotency is not None or hold.cache is not None:
            self._writer.recording = Recording()
        try:
            await self._generate(hold)
            hold = self.hold  # it may have been raised
            self.settled = await self._settle(hold)
        except BaseException:
            # Also where the settlement itself was cancelled: doing it twice is harmless, and not at all is
            # not.
            self.runtime.settlements.spawn(
                self._settle(self.hold or hold), f"settlement of {hold.request_id}"
            )
            raise
        finally:
            self._writer.quiet()
            self._forget_generation()
        await self._finish(hold)

    def client_left(self) -> None:
        """Nobody waits any more: stop the upstream where that stops the bill, else go on to learn the cost."""
        self.client.gone = True
        if self._reader is not None and self._may_abort():
            self._reader.cancel()

    # Before the upstream.

    async def _read_and_bound(self) -> None:
        """The body, bounded. What is wrong with it is said only to those whose key is right, and only they
        have models fetched.
        """
        request, catalog = self.request, self.runtime.catalog(self.request.credential.environment)
        if self.runtime.admission.is_suspect(request.credential):
            await self._verify()
        try:
            self._asked = read_request(request.endpoint, request.body, request.content_type)
            self._replay = read_replay_options(request, self._asked, self.runtime)
            self._end_user = end_user_of(
                request.endpoint, self._asked.fields, request.headers.get("x-end-user")
            )
            if catalog.is_fresh:
                self._bound = self._bound_with(await catalog.models())
                return
        except GatewayError:
            await self._verify()
            raise
        await self._verify()
        self._bound = self._bound_with(await catalog.models())

    def _bound_with(self, models: ModelIndex) -> Bound:
        settings = self.runtime.settings
        policy = BoundPolicy(
            settings.default_max_output_tokens, settings.free_models, self._upstream.suffixes
        )
        asked = self._asked
        return bound_request(
            self.request.endpoint.name,
            asked.fields,
            len(self.request.body),
            models,
            policy,
            seconds=asked.seconds,
        )

    async def _verify(self) -> None:
        if not self._verified:
            request, resource = self.request, self.request.endpoint.resource
            await self.runtime.admission.verify(
                request.credential, request_id=request.request_id, verb="write", resource=resource
            )
            self._verified = True

    def _order(self) -> AdmissionRequest:
        request = self.request
        return AdmissionRequest(
            request_id=request.request_id,
            client_request_id=request.client_request_id,
            endpoint=request.endpoint.name,
            resource=request.endpoint.resource,
            streamed=self._asked.is_streamed,
            bound=self._bound,
            end_user=self._end_user,
            price_basis=self._bound.price_basis,
            idempotency=self._replay.idempotency,
            cache=self._replay.cache,
            default_cache=self._replay.default_cache,
        )

    async def _give_again(self, stored: StoredReply) -> None:
        self.settled = {**stored.charge, "status": stored.source}
        if not self.client.gone:
            await send_stored_answer(stored, self.client, self._mode_headers())

    # The upstream, and what comes back.

    async def _generate(self, hold: Hold) -> None:
        """Forwards the request and relays the answer but for its end; notes in `outcome` how it went."""
        deadline = self.runtime.settings.deadline_seconds
        if self.client.gone:
            self.outcome.refused = True  # by its own client: nothing is sent
            return
        try:
            async with asyncio.timeout(deadline - (time.monotonic() - self.started)):
                await self._exchange(hold)
        except TimeoutError:
            self.outcome.failure = UpstreamTimeout(f"The request took longer than {deadline:g} seconds.")
        except Unreachable as failure:
            self.outcome.failure, self.outcome.refused = failure, True
        except GatewayError as failure:
            self.outcome.failure = failure
        except EventTooLarge:
            self.outcome.failure = UpstreamError("The model provider's answer is too large.")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self.client.gone or self._reader is None or task is None:
                raise
            task.uncancel()
        finally:
            self._reader = None

    async def _exchange(self, hold: Hold) -> None:
        """Sends the request; once more where prices have changed and the dearer hold is granted."""
        try:
            await self._send(hold)
        except GatewayError as refusal:
            if not is_price_change(refusal):
                raise
            raised = await reprice(
                self.runtime, self.request.credential.environment, hold, self._bound, self._bound_with
            )
            if raised is None or self.client.gone:
                raise
            self.hold, self._bound = raised
            self.outcome.refused, self.outcome.generation_id = False, None
            self._forget_generation()
            await self._send(self.hold)

    async def _send(self, hold: Hold) -> None:
        endpoint, scenario = self.request.endpoint, self.request.scenario
        body, headers = write_request(
            endpoint,
            self._asked,
            self._bound.apply(hold.granted_output),
            lambda text: self.runtime.pseudonym(hold.user_id, text),
        )
        scenario_header = (
            {"x-sandbox-scenario": scenario}
            if scenario and scenario.isascii() and self._upstream.is_sandbox
            else {}
        )
        headers = {**headers, **scenario_header, **beta_headers(self.request.headers)}
        answer = await self._upstream.send("/" + endpoint.name, body, headers, api_key=self._own_key(hold))
        try:
            self._learn_generation(hold, answer.generation_id)
            if answer.status != 200:
                await self._read_refusal(hold, answer)
            elif answer.is_stream:
                await self._relay(hold, answer)
            elif endpoint.answers_bytes and not answer.is_json:
                await self._pass_bytes(hold, answer)
            else:
                origin = RequestOrigin(self._upstream.is_sandbox, hold.byok)
                self._plain = read_answer(await answer.read(), endpoint.dialect, self.outcome, origin)
        finally:
            await answer.aclose()

    def _own_key(self, hold: Hold) -> str | None:
        """The user's own upstream key, where the request goes out under it: never under the operator's
        instead.
        """
        if not hold.byok:
            return None
        key = self.runtime.vault.decrypt(hold.provider_key) if hold.provider_key is not None else None
        if key is None:
            self.outcome.refused = True
            raise ProviderKeyRefused(
                "The OpenRouter key that you have stored cannot be read any more. Store it anew: /user/provider-key."
            )
        return key

    async def _read_refusal(self, hold: Hold, answer: UpstreamResponse) -> None:
        self.outcome.refused = answer.is_refusal
        origin = RequestOrigin(self._upstream.is_sandbox, hold.byok, self._bound.client_caps_price)
        raise error_from_upstream(answer.status, answer.headers, await answer.read(), origin)

    async def _relay(self, hold: Hold, answer: UpstreamResponse) -> None:
        stream = self._stream = Stream(
            sanitised_error, self.request.endpoint.dialect, choices=self._bound.choices
        )
        writer = self._writer
        self._reader = asyncio.current_task()
        async with aclosing(answer.chunks()) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                passed = stream.feed(chunk)
                if stream.data_events and self.outcome.first_token_ms is None:
                    self.outcome.first_token_ms = self._elapsed_ms()
                if self.outcome.generation_id is None and stream.body_id is not None:
                    self._learn_generation(hold, read_generation_id(stream.body_id))
                if not writer.started:
                    await writer.start_stream(self._headers(hold))
                await writer.send(passed)
                if stream.done or (self.client.gone and self._may_abort()):
                    break
        if not writer.started:
            await writer.start_stream(self._headers(hold))
        await writer.send(stream.end())
        self._reader = None
        self.outcome.completed = stream.is_whole and not stream.has_failed
        if not stream.is_whole and stream.error is None and not self.client.gone:
            raise UpstreamError("The model provider's answer ended too early.")

    async def _pass_bytes(self, hold: Hold, answer: UpstreamResponse) -> None:
        """An answer that is no text goes on as it comes; its last piece waits for the settlement."""
        self._content_type = content_type = bytes_type(answer.headers.get("content-type"))
        async with aclosing(answer.chunks()) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if self._plain is None:
                    self.outcome.first_token_ms = self._elapsed_ms()
                elif not self._writer.started:
                    await self._writer.start({**self._headers(hold), "content-type": content_type})
                await self._writer.send(self._plain or b"")
                self._plain = chunk
        if self._plain is None:
            raise UpstreamError("The model provider's answer is empty.")
        self.outcome.completed = True

    def _may_abort(self) -> bool:
        return self._stream is not None and stops_on_abort(self._stream.provider)

    def _learn_generation(self, hold: Hold, generation_id: str | None) -> None:
        """A request that is still running in two seconds has its generation id stored, so that any instance
        can finish it.
        """
        self.outcome.generation_id = generation_id
        if generation_id is not None:
            note = self.runtime.note_generation
            self._timers.append(
                asyncio.get_running_loop().call_later(
                    NOTE_GENERATION_SECONDS, note, hold.request_id, generation_id
                )
            )

    def _forget_generation(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    # The end.

    async def _settle(self, hold: Hold) -> dict[str, Any] | None:
        """Charges what the request cost. None while that is open: the cost is not known yet, or the database
        does not answer.
        """
        self._writer.quiet()
        outcome, stream = self.outcome, self._stream
        if stream is not None:
            outcome.learn(stream)
        item = {**self._settlement(hold), **await self._kept(hold)}
        said_all = (
            stream is None or stream.is_whole
        )  # in a stream that broke off, usage may be a running count
        if outcome.generation_id is None or (item["source"] != "none" and said_all):
            return await self.runtime.settlements.settle(item)
        place: dict[str, Any] = {
            "mode": self.runtime.mode,
            "environment": hold.environment,
            "generation_id": outcome.generation_id,
        }
        place |= {"byok": hold.byok, "provider_key": hold.provider_key}
        found = await self.runtime.settlements.look_up_now(place)
        if found is None:
            # Whichever process is there then: what is asked later must be known to all of them.
            await self.runtime.keep_generation(hold.request_id, outcome.generation_id)
            self.runtime.settlements.resolve_later(place, item)
            return None
        item = with_generation(item, found)
        outcome.usage = replace(
            found, prompt_tokens=item["prompt_tokens"], completion_tokens=item["completion_tokens"]
        )
        return await self.runtime.settlements.settle(item)

    def _settlement(self, hold: Hold) -> dict[str, Any]:
        outcome = self.outcome
        known = outcome.usage is not None and outcome.usage.cost is not None
        usage = outcome.usage or (NOTHING_USED if outcome.refused else Usage())
        status = "cancelled" if self.client.gone else "completed" if outcome.completed else "failed"
        failure = outcome.failure.code if outcome.failure else None
        stream_error = (
            self._stream.error.get("code") if self._stream is not None and self._stream.error else None
        )
        return settlement(
            hold.request_id,
            status,
            "usage" if known or outcome.refused else "none",
            usage,
            model_used=outcome.model,
            provider=outcome.provider,
            finish_reason=outcome.finish_reason,
            error_code=failure or (None if stream_error is None else read_text(str(stream_error))),
            latency_ms=self._elapsed_ms(),
            time_to_first_token_ms=outcome.first_token_ms,
            generation_id=outcome.generation_id,
        )

    async def _kept(self, hold: Hold) -> dict[str, Any]:
        """The answer as it is kept to be given again, where that was asked for and it is whole: the same,
        however often it is settled.
        """
        recording, outcome = self._writer.recording, self.outcome
        if recording is None or not outcome.completed:
            return {}
        if self._sealing is None:
            recording.add(self._last_bytes(hold, CHARGE_MARK))
            content_type = EVENTS if self._stream is not None else self._content_type
            self._sealing = asyncio.create_task(
                seal_answer(recording, content_type, outcome.generation_id, self.runtime.vault)
            )
        kept = await asyncio.shield(self._sealing)
        return (
            {**kept, "cache": hold.cache}
            if kept and hold.cache is not None and not self._is_cut(hold)
            else kept
        )

    def _is_cut(self, hold: Hold) -> bool:
        """Whether it was the account's money that ended the answer: with more of it another one would be
        given.
        """
        used = self.outcome.usage.completion_tokens if self.outcome.usage else None
        return hold.granted_output < self._bound.max_output and (used is None or used >= hold.granted_output)

    def _last_bytes(self, hold: Hold, charge: bytes) -> bytes:
        """The end of the answer, which tells the client what was charged."""
        if self._stream is not None:
            return self._stream.tail(charge, self.outcome.failure, hold.request_id)
        last = self._plain or b""
        return with_field(last, "gateway_usage", charge) if self._content_type == "application/json" else last

    async def _finish(self, hold: Hold) -> None:
        """The last bytes, which tell the client what was charged."""
        failure, writer = self.outcome.failure, self._writer
        if self.client.gone:
            return
        if self._stream is not None and writer.started:
            await writer.end(self._last_bytes(hold, self._charge(hold)))
        elif writer.started and failure is not None:
            return  # unended: only a connection that breaks off tells that these bytes are not all
        elif failure is not None:
            failure.extra_headers |= {**self._headers(hold), **charge_headers(self.settled)}
            raise failure
        elif self._plain is not None:
            await self._end_plain(hold, self._last_bytes(hold, self._charge(hold)))

    async def _end_plain(self, hold: Hold, last: bytes) -> None:
        if not self._writer.started:
            about = {"content-type": self._content_type, "content-length": str(len(last))}
            await self._writer.start({**self._headers(hold), **charge_headers(self.settled), **about})
        await self._writer.end(last)

    def _charge(self, hold: Hold) -> bytes:
        return gateway_usage(hold.request_id, self._tokens(), self.settled)

    def _tokens(self) -> int:
        return self.outcome.usage.total_tokens if self.outcome.usage else 0

    def _headers(self, hold: Hold) -> dict[str, str]:
        found = {**limit_headers(hold.limits), **self._mode_headers()}
        if self.outcome.generation_id:
            found["x-generation-id"] = self.outcome.generation_id
        if hold.cache is not None:
            found |= MISS
        if hold.byok:
            found["x-gateway-byok"] = "true"
        if self._bound.min_output != self._bound.max_output:
            found["x-gateway-max-tokens"] = str(hold.granted_output)
        return found

    def _mode_headers(self) -> dict[str, str]:
        return {"x-gateway-mode": "sandbox"} if self._upstream.is_sandbox else {}

    def _elapsed_ms(self) -> int:
        return int((time.monotonic() - self.started) * 1000)
