"""What happens to one proxied request, from its body to its settlement? Bound, admit, forward, relay, settle.

From admission on this module owns the hold, and settles it on every ending: answer, error, timeout, a client that leaves before the
first byte or in mid-stream, shutdown. The work runs in a task of its own, so that no client's leaving cancels it half-way, and nothing
relies on a generator having started.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from admission import Hold, Order
from bounds import Bound, BoundPolicy, bound_request
from catalog import ModelIndex
from ending import Client, Ending, Proxied
from errors import BadRequest, GatewayError, UpstreamError, UpstreamTimeout, UpstreamUnavailable
from openrouter import Answer, Unreachable, Upstream, error_of, error_status, is_price_change, sanitised_error, stops_on_abort
from refusals import limit_headers
from relay import BOM, DONE, KEEP_ALIVE, EventTooLarge, Stream, usage_event, with_field, without_secrets
from replies import charge_headers, gateway_usage, to_json
from settlements import settlement, with_generation
from usage import Usage, parse_json, read_generation_id, read_text, read_usage

if TYPE_CHECKING:
    from runtime import Runtime

log = structlog.get_logger("metering")

KEEP_ALIVE_SECONDS = 15.0
NOTE_GENERATION_SECONDS = 2.0
MAX_DEPTH = 250
NOTHING_USED = Usage(prompt_tokens=0, completion_tokens=0, cost=Decimal(0))
# Fields that would reach across tenants or show the operator's account, in requests and in answers.
NOT_FORWARDED = ("debug", "trace", "cache")
MAX_CONTAINERS, MAX_VALUES = 200_000, 1_000_000
NAMESPACED = ("session_id", "prompt_cache_key")


def read_body(raw: bytes) -> dict[str, Any]:
    """The parsed body. Raises BadRequest; before parsing where that would take more memory and time than any honest body."""
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS or raw.count(b",") > MAX_VALUES:
        raise BadRequest("The request body has too many parts.", code="invalid_json")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise BadRequest("The request body must be a JSON object.", code="invalid_json")
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH:
        try:
            orjson.dumps(body)  # which takes less nesting than reading does
        except orjson.JSONEncodeError as error:
            raise BadRequest(f"The request body is nested too deeply: {error}.", code="invalid_json") from None
    return body


@dataclass(slots=True)
class Exchange:
    """One proxied request on its way. `run` is awaited in a task of its own; `client_left` tells it that nobody waits any more."""

    runtime: Runtime
    request: Proxied
    client: Client
    started: float = field(default_factory=time.monotonic)
    ending: Ending = field(default_factory=Ending)
    settled: dict[str, Any] | None = None
    hold: Hold | None = None
    _upstream: Upstream = field(init=False)
    _bound: Bound = field(init=False)
    _plain: bytes | None = None
    _stream: Stream | None = None
    _stream_started: bool = False
    _settling: bool = False
    _last_sent: float = 0.0
    _reader: asyncio.Task[Any] | None = None
    _timers: list[asyncio.TimerHandle] = field(default_factory=list)

    async def run(self) -> None:
        """Does all of it. Raises GatewayError only while no byte of an answer has been sent; the hold is settled then, too."""
        self._upstream = self.runtime.upstream(self.request.credential.environment)
        body = await self._read_and_bound()
        hold = await self.runtime.admission.admit(self.request.credential, self._order(body))
        if not isinstance(hold, Hold):
            raise TypeError("a stored answer that was not asked for")
        self.hold = hold
        try:
            await self._generate(hold, body)
            self.settled = await self._settle(hold)
        except BaseException:
            # Also where the settlement itself was cancelled: doing it twice is harmless, and not at all is not.
            self.runtime.settlements.spawn(self._settle(hold), f"settlement of {hold.request_id}")
            raise
        finally:
            for timer in self._timers:
                timer.cancel()
        await self._finish(hold)

    def client_left(self) -> None:
        """Nobody waits any more: stop the upstream where that stops the bill, else go on to learn the cost."""
        self.client.gone = True
        if self._reader is not None and self._may_abort():
            self._reader.cancel()

    # Before the upstream.

    async def _read_and_bound(self) -> dict[str, Any]:
        """The body, bounded. What is wrong with it is said only to those whose key is right, and only they have models fetched."""
        catalog = self.runtime.catalog(self.request.credential.environment)
        try:
            body = read_body(self.request.body)
            if catalog.is_fresh:
                self._bound = self._bound_of(body, await catalog.models())
                return body
        except GatewayError:
            await self._verify()
            raise
        await self._verify()
        self._bound = self._bound_of(body, await catalog.models())
        return body

    def _bound_of(self, body: Mapping[str, Any], models: ModelIndex) -> Bound:
        settings = self.runtime.settings
        policy = BoundPolicy(settings.default_max_output_tokens, settings.free_models, self._upstream.suffixes)
        return bound_request(self.request.endpoint, body, len(self.request.body), models, policy)

    async def _verify(self) -> None:
        request = self.request
        await self.runtime.admission.verify(request.credential, request_id=request.request_id, verb="write", resource=request.resource)

    def _order(self, body: Mapping[str, Any]) -> Order:
        request = self.request
        return Order(
            request_id=request.request_id,
            client_request_id=request.client_request_id,
            endpoint=request.endpoint,
            resource=request.resource,
            streamed=body.get("stream") is True,
            bound=self._bound,
        )

    def _outgoing(self, hold: Hold, body: Mapping[str, Any]) -> bytes:
        """The body as the upstream gets it: capped to what was granted, and with nothing in it that crosses tenants."""
        sent = {name: value for name, value in body.items() if name not in NOT_FORWARDED}
        sent.update(self._bound.apply(hold.granted_output))
        for name in NAMESPACED:
            if sent.get(name) is not None:
                sent[name] = self.runtime.pseudonym(hold.user_id, str(sent[name]))
        sent["user"] = self.runtime.pseudonym(hold.user_id, str(body.get("user") or ""))
        return orjson.dumps(sent)

    # The upstream, and what comes back.

    async def _generate(self, hold: Hold, body: Mapping[str, Any]) -> None:
        """Forwards the request and relays the answer but for its end; notes in `ending` how it went."""
        deadline = self.runtime.settings.deadline_seconds
        if self.client.gone:
            self.ending.refused = True  # by its own client: nothing is sent
            return
        try:
            async with asyncio.timeout(deadline - (time.monotonic() - self.started)):
                await self._exchange(hold, body)
        except TimeoutError:
            self.ending.failure = UpstreamTimeout(f"The request took longer than {deadline:g} seconds.")
        except Unreachable as failure:
            self.ending.failure, self.ending.refused = failure, True
        except GatewayError as failure:
            self.ending.failure = failure
        except EventTooLarge:
            self.ending.failure = UpstreamError("The model provider's answer is too large.")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self.client.gone or self._reader is None or task is None:
                raise
            task.uncancel()
        finally:
            self._reader = None

    async def _exchange(self, hold: Hold, body: Mapping[str, Any]) -> None:
        scenario = self.request.scenario
        headers = {"x-sandbox-scenario": scenario} if scenario and scenario.isascii() and self._upstream.suffixes else {}
        answer = await self._upstream.send("/" + self.request.endpoint, self._outgoing(hold, body), headers)
        try:
            self._learn_generation(hold, answer.generation_id)
            if answer.status != 200:
                await self._read_refusal(answer)
            elif answer.is_stream:
                await self._relay(hold, answer)
            else:
                self._read_plain(await answer.read())
        finally:
            await answer.aclose()

    async def _read_refusal(self, answer: Answer) -> None:
        self.ending.refused = answer.is_refusal
        failure = error_of(answer.status, answer.headers, await answer.read(), invented=bool(self._upstream.suffixes))
        if is_price_change(failure):
            self.runtime.settlements.spawn(self._refresh_prices(), "refresh of the model list")
        raise failure

    async def _refresh_prices(self) -> None:
        try:
            await self.runtime.catalog(self.request.credential.environment).refresh()
        except UpstreamUnavailable as error:
            log.warning("prices_not_refreshed", reason=error.message)

    def _read_plain(self, raw: bytes) -> None:
        raw = raw.removeprefix(BOM)
        try:
            data = parse_json(raw)
        except ValueError:
            raise UpstreamError("The model provider's answer is not JSON.") from None
        if not isinstance(data, dict):
            raise UpstreamError("The model provider's answer is not a JSON object.")
        ending = self.ending
        ending.usage = read_usage(data.get("usage"))
        ending.generation_id = ending.generation_id or read_generation_id(data.get("id"))
        ending.model, ending.provider = read_text(data.get("model")), read_text(data.get("provider"))
        choices = data.get("choices")
        if data.get("error") and not choices:
            raise error_of(error_status(data) or 502, {}, raw, invented=bool(self._upstream.suffixes))
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            ending.finish_reason = read_text(choices[0].get("finish_reason"))
        ending.completed = ending.finish_reason != "error" and not data.get("error")
        self._plain = without_secrets(raw, sanitised_error)

    async def _relay(self, hold: Hold, answer: Answer) -> None:
        stream = self._stream = Stream(sanitised_error)
        self._reader = asyncio.current_task()
        async with aclosing(answer.chunks()) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                passed = stream.feed(chunk)
                if stream.data_events and self.ending.first_token_ms is None:
                    self.ending.first_token_ms = self._elapsed_ms()
                if self.ending.generation_id is None and stream.body_id is not None:
                    self._learn_generation(hold, read_generation_id(stream.body_id))
                await self._pass_on(hold, answer, passed)
                if stream.done or (self.client.gone and self._may_abort()):
                    break
        await self._pass_on(hold, answer, stream.end())
        self._reader = None
        self.ending.completed = stream.is_whole and stream.error is None and stream.finish_reason != "error"
        if not stream.is_whole and stream.error is None and not self.client.gone:
            raise UpstreamError("The model provider's answer ended too early.")

    async def _pass_on(self, hold: Hold, answer: Answer, data: bytes) -> None:
        if self.client.gone:
            return
        if not self._stream_started:
            self._stream_started = True
            self._keep_alive_in_time()
            await self.client.start(200, {**self._headers(hold), "content-type": "text/event-stream", "cache-control": "no-cache"})
        if data:
            self._last_sent = time.monotonic()
            await self.client.send(data, more=True)

    def _may_abort(self) -> bool:
        return self._stream is not None and stops_on_abort(self._stream.provider)

    def _learn_generation(self, hold: Hold, generation_id: str | None) -> None:
        """A request that is still running in two seconds has its generation id stored, so that any instance can finish it."""
        self.ending.generation_id = generation_id
        if generation_id is not None:
            note = self.runtime.note_generation
            self._timers.append(asyncio.get_running_loop().call_later(NOTE_GENERATION_SECONDS, note, hold.request_id, generation_id))

    def _keep_alive_in_time(self) -> None:
        """A comment after every 15 s of silence, so that nothing between us and the client takes the stream for dead."""

        def tick() -> None:
            if self.client.gone or self._settling:
                return
            if time.monotonic() - self._last_sent >= KEEP_ALIVE_SECONDS:
                self._last_sent = time.monotonic()
                self.runtime.settlements.spawn(self.client.send(KEEP_ALIVE, more=True), "keep-alive")
            self._timers[:] = [loop.call_later(KEEP_ALIVE_SECONDS, tick), *self._timers[:1]]

        loop = asyncio.get_running_loop()
        self._timers.append(loop.call_later(KEEP_ALIVE_SECONDS, tick))

    # The end.

    async def _settle(self, hold: Hold) -> dict[str, Any] | None:
        """Charges what the request cost. None while that is open: the cost is not known yet, or the database does not answer."""
        self._settling = True
        ending, stream = self.ending, self._stream
        if stream is not None:
            ending.usage, ending.model, ending.provider = stream.usage, stream.model, stream.provider
            ending.finish_reason = stream.finish_reason
        item = self._settlement(hold)
        said_all = stream is None or stream.is_whole  # in a stream that broke off, usage may be a running count
        if ending.generation_id is None or (item["source"] != "none" and said_all):
            return await self.runtime.settlements.settle(item)
        place = {"mode": self.runtime.mode, "environment": hold.environment, "generation_id": ending.generation_id}
        found = await self.runtime.settlements.look_up_now(place)
        if found is None:
            # Whichever process is there then: what is asked later must be known to all of them.
            await self.runtime.keep_generation(hold.request_id, ending.generation_id)
            self.runtime.settlements.resolve_later(place, item)
            return None
        ending.usage = found
        return await self.runtime.settlements.settle(with_generation(item, found))

    def _settlement(self, hold: Hold) -> dict[str, Any]:
        ending = self.ending
        known = ending.usage is not None and ending.usage.cost is not None
        usage = ending.usage or (NOTHING_USED if ending.refused else Usage())
        status = "cancelled" if self.client.gone else "completed" if ending.completed else "failed"
        failure = ending.failure.code if ending.failure else None
        stream_error = self._stream.error.get("code") if self._stream is not None and self._stream.error else None
        return settlement(
            hold.request_id,
            status,
            "usage" if known or ending.refused else "none",
            usage,
            model_used=ending.model,
            provider=ending.provider,
            finish_reason=ending.finish_reason,
            error_code=failure or (None if stream_error is None else read_text(str(stream_error))),
            latency_ms=self._elapsed_ms(),
            time_to_first_token_ms=ending.first_token_ms,
            generation_id=ending.generation_id,
        )

    async def _finish(self, hold: Hold) -> None:
        """The last bytes, which tell the client what was charged."""
        if self.client.gone:
            return
        if self._stream is not None and self._stream_started:
            await self.client.send(self._tail(hold, self._stream), more=False)
        elif (failure := self.ending.failure) is not None:
            failure.extra_headers |= {**self._headers(hold), **charge_headers(self.settled)}
            raise failure
        elif self._plain is not None:
            body = with_field(self._plain, "gateway_usage", self._charge(hold))
            about = {"content-type": "application/json", "content-length": str(len(body))}
            await self.client.start(200, {**self._headers(hold), **charge_headers(self.settled), **about})
            await self.client.send(body, more=False)

    def _tail(self, hold: Hold, stream: Stream) -> bytes:
        parts = [usage_event(stream.held, stream, self._charge(hold))]
        if self.ending.failure is not None:
            parts.append(b"data: " + to_json(self.ending.failure.body(hold.request_id)) + b"\n\n")
        return b"".join((*parts, DONE))

    def _charge(self, hold: Hold) -> bytes:
        return gateway_usage(hold.request_id, self.ending.usage.total_tokens if self.ending.usage else 0, self.settled)

    def _headers(self, hold: Hold) -> dict[str, str]:
        found = limit_headers(hold.limits)
        if self.ending.generation_id:
            found["x-generation-id"] = self.ending.generation_id
        if self._upstream.suffixes:
            found["x-gateway-mode"] = "sandbox"
        if self._bound.min_output != self._bound.max_output:
            found["x-gateway-max-tokens"] = str(hold.granted_output)
        return found

    def _elapsed_ms(self) -> int:
        return int((time.monotonic() - self.started) * 1000)
