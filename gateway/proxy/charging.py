"""Charges a request by its outcome, and sends the end of its answer, which tells the client what was charged.

Settling is idempotent: whatever interrupts it, it may be done again, and gives the same charge.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from decimal import Decimal

from db_rows.requests import Settled, SettlementDetails, SettlementItem, SettlementSource, SettlementStatus
from gateway.billing.settlement import Generation, settlement, with_generation
from gateway.billing.stored_answers import CHARGE_MARK
from gateway.proxy.admitted_request import AdmittedRequest
from gateway.proxy.charge_report import charge_headers, gateway_usage
from gateway.proxy.idempotency_and_cache import EVENTS, seal_answer
from gateway.proxy.outcome import JSON, Client, Outcome
from gateway.proxy.response_headers import response_headers
from gateway.proxy.response_writer import ResponseWriter
from gateway.proxy.services import Services
from gateway.proxy.sse import with_field
from gateway.upstream.usage import Usage, read_text

NOTHING_USED = Usage(prompt_tokens=0, completion_tokens=0, cost=Decimal(0))


@dataclass(slots=True)
class Charging:
    """The charge of one admitted request; `charge` is None until it is settled."""

    admitted: AdmittedRequest
    services: Services
    client: Client
    writer: ResponseWriter
    outcome: Outcome
    charge: Settled | None = None
    _sealing: asyncio.Task[str | None] | None = None

    async def settle(self) -> Settled | None:
        """Charges what the request cost. None while that is open: the cost is not known yet, or the database
        does not answer.
        """
        # A keep-alive after the last event would follow the end of the stream.
        self.writer.stop_keep_alives()
        outcome = self.outcome
        if outcome.stream is not None:
            outcome.learn(outcome.stream)
        item = await self._item()
        if outcome.generation_id is not None and (item["source"] == "none" or not outcome.has_final_usage):
            return await self._settle_by_generation(item, outcome.generation_id)
        self.charge = await self.services.settlements.settle(item)
        return self.charge

    async def _settle_by_generation(self, item: SettlementItem, generation_id: str) -> Settled | None:
        hold, settlements = self.admitted.hold, self.services.settlements
        generation = Generation(
            self.services.mode, hold.environment, generation_id, hold.byok, hold.provider_key
        )
        usage = await settlements.look_up_now(generation)
        if usage is None:
            # Stored first: whichever instance is there later must know what to ask about.
            await settlements.keep_generation(hold.request_id, generation_id)
            settlements.resolve_later(generation, item)
            return None
        item = with_generation(item, usage)
        prompt, completion = item["prompt_tokens"], item["completion_tokens"]
        self.outcome.usage = replace(usage, prompt_tokens=prompt, completion_tokens=completion)
        self.charge = await settlements.settle(item)
        return self.charge

    async def _item(self) -> SettlementItem:
        outcome = self.outcome
        is_known = outcome.refused or (outcome.usage is not None and outcome.usage.cost is not None)
        # No usage after a refusal is a cost of zero that is known; after anything else it is not known.
        usage = outcome.usage or (NOTHING_USED if outcome.refused else Usage())
        details: SettlementDetails = {
            "model_used": outcome.model,
            "provider": outcome.provider,
            "finish_reason": outcome.finish_reason,
            "error_code": self._error_code(),
            "latency_ms": self.admitted.elapsed_ms,
            "time_to_first_token_ms": outcome.first_token_ms,
            "generation_id": outcome.generation_id,
            **await self._stored_answer(),
        }
        source: SettlementSource = "usage" if is_known else "none"
        return settlement(self.admitted.hold.request_id, self._status(), source, usage, **details)

    def _status(self) -> SettlementStatus:
        if self.client.gone:
            return "cancelled"
        return "completed" if self.outcome.completed else "failed"

    def _error_code(self) -> str | None:
        if self.outcome.failure is not None:
            return self.outcome.failure.code
        stream = self.outcome.stream
        code = stream.error.get("code") if stream is not None and stream.error else None
        return None if code is None else read_text(str(code))

    async def _stored_answer(self) -> SettlementDetails:
        """The answer as it is stored for a replay or the cache, where that was asked for and the answer is
        whole.

        It is recorded and sealed once, however often it is settled.
        """
        recording, outcome = self.writer.recording, self.outcome
        if recording is None or not outcome.completed:
            return {}
        if self._sealing is None:
            recording.add(self._last_bytes(CHARGE_MARK))
            content_type = EVENTS if outcome.stream is not None else outcome.content_type
            sealing = seal_answer(recording, content_type, outcome.generation_id, self.services.vault)
            self._sealing = asyncio.create_task(sealing)
        # Shielded: a settlement that is cancelled is done again, and needs the same answer.
        sealed = await asyncio.shield(self._sealing)
        if sealed is None:
            return {}
        cache = self.admitted.hold.cache
        if cache is None or self._is_cut_by_credits():
            return {"stored_answer": sealed}
        return {"stored_answer": sealed, "cache": cache}

    def _is_cut_by_credits(self) -> bool:
        """Whether the account's credits ended the answer: with more of them it would have been another one,
        so it does not belong into the cache.
        """
        granted, usage = self.admitted.hold.granted_output, self.outcome.usage
        used = usage.completion_tokens if usage else None
        return granted < self.admitted.bound.max_output and (used is None or used >= granted)

    async def send_end(self) -> None:
        """Sends the last bytes. Raises the outcome's failure where nothing has been sent yet."""
        failure = self.outcome.failure
        if self.client.gone:
            return
        if self.outcome.stream is not None and self.writer.started:
            await self.writer.end(self._last_bytes(self._gateway_usage()))
        elif self.writer.started and failure is not None:
            return  # left open: only a connection that breaks off tells that these bytes are not all
        elif failure is not None:
            # Nothing was sent yet, so the failure is the response: with its status, and with what it was
            # charged.
            failure.extra_headers |= {**self._headers(), **charge_headers(self.charge)}
            raise failure
        elif self.outcome.body is not None:
            await self._end_plain(self._last_bytes(self._gateway_usage()))

    async def _end_plain(self, last: bytes) -> None:
        if not self.writer.started:
            body = {"content-type": self.outcome.content_type, "content-length": str(len(last))}
            await self.writer.start({**self._headers(), **charge_headers(self.charge), **body})
        await self.writer.end(last)

    def _last_bytes(self, usage: bytes) -> bytes:
        """The end of the answer with this JSON object as its `gateway_usage`."""
        outcome = self.outcome
        if outcome.stream is not None:
            return outcome.stream.tail(usage, outcome.failure, self.admitted.hold.request_id)
        # Into the bytes as they came, not into a parsed answer: what we do not know stays as it was.
        last = outcome.body or b""
        return with_field(last, "gateway_usage", usage) if outcome.content_type == JSON else last

    def _gateway_usage(self) -> bytes:
        return gateway_usage(self.admitted.hold.request_id, self.outcome.total_tokens, self.charge)

    def _headers(self) -> dict[str, str]:
        return {**response_headers(self.admitted, self.outcome), **self.services.mode_headers}
