"""Idempotency-Key and cache headers; sends a stored answer. Reads what a request says of it, and sends what
was kept.

`Idempotency-Key` asks for one run, however often it is sent; the cache headers for an answer that somebody of
this account has had. OpenRouter's own cache headers are taken for ours: its cache is the operator's
account's, and would be shared by all tenants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
import structlog

from common.errors import BadRequest
from gateway.billing.hold import StoredReply
from gateway.billing.rate_limit_headers import limit_headers
from gateway.billing.stored_answers import AnswerSlot, Recording, StoredAnswer, cache_slot, idempotency_slot
from gateway.proxy.beta_headers import beta_headers
from gateway.proxy.charge_report import charge_headers, gateway_usage
from gateway.proxy.outcome import Client
from gateway.proxy.request import IncomingRequest, ParsedRequest
from gateway.runtime.instance import Runtime
from security import Vault

log = structlog.get_logger("keeping")

MAX_CACHE_SECONDS = 86_400
DEFAULT_CACHE_SECONDS = 300
CACHE, CACHE_TTL, CACHE_CLEAR = (
    (f"x-gateway-{name}", f"x-openrouter-{name}") for name in ("cache", "cache-ttl", "cache-clear")
)
HIT, MISS = ({"x-gateway-cache": status, "x-openrouter-cache-status": status} for status in ("HIT", "MISS"))
EVENTS = "text/event-stream"


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """Where this request's answer may be found, and is to be kept. `default_cache`: where its key uses the
    cache by default.
    """

    idempotency: AnswerSlot | None = None
    cache: AnswerSlot | None = None
    default_cache: Callable[[], AnswerSlot] | None = None


def read_replay_options(request: IncomingRequest, asked: ParsedRequest, runtime: Runtime) -> ReplayOptions:
    """What the request's headers ask for. Raises BadRequest."""
    headers, environment = request.headers, request.credential.environment
    key = headers.get("idempotency-key")
    idempotency = (
        None
        if key is None
        else idempotency_slot(
            runtime.mode, environment, request.endpoint.name, key, _repeated_content(request, asked)
        )
    )
    wanted = _switch(headers, CACHE)
    if wanted is False:
        return ReplayOptions(idempotency)
    place = partial(_cache_place, request, asked, runtime)
    if wanted is None:
        return ReplayOptions(
            idempotency, default_cache=partial(place, clear=_switch(headers, CACHE_CLEAR) or False)
        )
    return ReplayOptions(
        idempotency, cache=place(ttl_seconds=_ttl(headers), clear=_switch(headers, CACHE_CLEAR) or False)
    )


def _repeated_content(request: IncomingRequest, asked: ParsedRequest) -> bytes:
    """What must be the same where a request is repeated: of a form its contents, as clients part it anew each
    time they send it.
    """
    if asked.file is None:
        return request.body
    return orjson.dumps(
        [
            asked.fields,
            asked.file.name,
            asked.file.content_type,
            hashlib.sha256(asked.file.content).hexdigest(),
        ],
        option=orjson.OPT_SORT_KEYS,
    )


def _cache_place(
    request: IncomingRequest,
    asked: ParsedRequest,
    runtime: Runtime,
    *,
    ttl_seconds: int | None = None,
    clear: bool = False,
) -> AnswerSlot:
    variant = hashlib.sha256(asked.file.content).hexdigest() if asked.file is not None else ""
    name, environment = request.endpoint.name, request.credential.environment
    # What decides the answer, too: the scenario of the sandbox, and features that stand in no body.
    also = "\0".join((request.scenario or "", *beta_headers(request.headers).values()))
    return cache_slot(
        runtime.mode,
        environment,
        name,
        asked.fields,
        runtime.vault,
        variant=f"{variant}\0{also}",
        ttl_seconds=ttl_seconds,
        clear=clear,
    )


def _named(headers: Mapping[str, str], names: tuple[str, str]) -> tuple[str, str] | None:
    return next(
        ((name, value.strip().lower()) for name in names if (value := headers.get(name)) is not None), None
    )


def _switch(headers: Mapping[str, str], names: tuple[str, str]) -> bool | None:
    found = _named(headers, names)
    if found is None:
        return None
    name, value = found
    if value not in ("true", "false"):
        raise BadRequest(f"`{name}` is `true` or `false`.", param=name)
    return value == "true"


def _ttl(headers: Mapping[str, str]) -> int:
    found = _named(headers, CACHE_TTL)
    if found is None:
        return DEFAULT_CACHE_SECONDS
    name, value = found
    seconds = int(value) if value.isascii() and value.isdigit() and len(value) < 7 else 0
    if not 1 <= seconds <= MAX_CACHE_SECONDS:
        raise BadRequest(f"`{name}` is a number of seconds from 1 to {MAX_CACHE_SECONDS}.", param=name)
    return seconds


async def send_stored_answer(stored: StoredReply, client: Client, more_headers: Mapping[str, str]) -> None:
    """Sends an answer that was kept, with what it was charged then (a cached one: nothing)."""
    answer = stored.answer
    body = answer.body(gateway_usage(stored.request_id, stored.tokens, stored.charge))
    headers = {**limit_headers(stored.limits), **more_headers, **answer.headers}
    if stored.source == "cache":
        headers |= {**HIT, "age": str(stored.age_seconds)}
    else:
        headers |= {"idempotent-replayed": "true"}
    if answer.headers.get("content-type") == EVENTS:
        headers |= {"cache-control": "no-cache"}
    else:
        headers |= {**charge_headers(stored.charge), "content-length": str(len(body))}
    await client.start(answer.status, headers)
    await client.send(body, more=False)


async def seal_answer(
    recording: Recording, content_type: str, generation_id: str | None, vault: Vault
) -> dict[str, Any]:
    """The answer as a settlement item carries it to be kept; empty where it is too large, or cannot be
    sealed.
    """
    pieces = recording.pieces()
    if pieces is None:
        return {}
    headers = {"content-type": content_type, **({"x-generation-id": generation_id} if generation_id else {})}
    try:
        return {"stored_answer": await StoredAnswer(200, headers, pieces).seal(vault)}
    except Exception as error:  # whatever it was, the charge must not be lost with it
        log.error("answer_not_sealed", exc_info=error)
        return {}
