"""Reads Idempotency-Key and the cache headers, and sends and seals stored answers.

`Idempotency-Key` asks for one run, however often it is sent; the cache headers ask for an answer that this
account has had before. OpenRouter's own cache headers are read as ours: its cache belongs to the operator's
account, and would be shared by all tenants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

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
from gateway.proxy.services import Services
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
    """Where this request's answer may be found, and is to be stored. `default_cache` makes the slot in case
    its key uses the cache by default.
    """

    idempotency: AnswerSlot | None = None
    cache: AnswerSlot | None = None
    default_cache: Callable[[], AnswerSlot] | None = None


def read_replay_options(request: IncomingRequest, parsed: ParsedRequest, services: Services) -> ReplayOptions:
    """What the request's headers ask for. Raises BadRequest."""
    headers = request.headers
    idempotency = _idempotency_slot(request, parsed, services.mode)
    wants_cache = _switch(headers, CACHE)
    if wants_cache is False:
        return ReplayOptions(idempotency)
    slot = partial(_cache_slot, request, parsed, services)
    ttl_seconds = _ttl(headers) if wants_cache else None
    clear = _switch(headers, CACHE_CLEAR) or False
    if wants_cache is None:
        return ReplayOptions(idempotency, default_cache=partial(slot, clear=clear))
    return ReplayOptions(idempotency, cache=slot(ttl_seconds=ttl_seconds, clear=clear))


def _idempotency_slot(request: IncomingRequest, parsed: ParsedRequest, mode: str) -> AnswerSlot | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    environment, content = request.credential.environment, _repeatable_content(request, parsed)
    return idempotency_slot(mode, environment, request.endpoint.name, key, content)


def _repeatable_content(request: IncomingRequest, parsed: ParsedRequest) -> bytes:
    """What is the same when a request is repeated. Of a form these are its contents: clients make a new
    boundary each time they send it.
    """
    if parsed.file is None:
        return request.body
    file = parsed.file
    # Of the file its hash: the body of a form may have 25 MB.
    contents = [parsed.fields, file.name, file.content_type, hashlib.sha256(file.content).hexdigest()]
    return orjson.dumps(contents, option=orjson.OPT_SORT_KEYS)


def _cache_slot(
    request: IncomingRequest,
    parsed: ParsedRequest,
    services: Services,
    *,
    ttl_seconds: int | None = None,
    clear: bool = False,
) -> AnswerSlot:
    file_hash = hashlib.sha256(parsed.file.content).hexdigest() if parsed.file is not None else ""
    # These decide the answer too: the sandbox's scenario, and features that are asked for in headers.
    variant = "\0".join((file_hash, request.scenario or "", *beta_headers(request.headers).values()))
    return cache_slot(
        services.mode,
        request.credential.environment,
        request.endpoint.name,
        parsed.fields,
        services.vault,
        variant=variant,
        ttl_seconds=ttl_seconds,
        clear=clear,
    )


def _header(headers: Mapping[str, str], names: tuple[str, str]) -> tuple[str, str] | None:
    """The first of these headers that was sent: its name, and its value in lower case."""
    for name in names:
        if (value := headers.get(name)) is not None:
            return name, value.strip().lower()
    return None


def _switch(headers: Mapping[str, str], names: tuple[str, str]) -> bool | None:
    header = _header(headers, names)
    if header is None:
        return None
    name, value = header
    if value not in ("true", "false"):
        raise BadRequest(f"`{name}` is `true` or `false`.", param=name)
    return value == "true"


def _ttl(headers: Mapping[str, str]) -> int:
    header = _header(headers, CACHE_TTL)
    if header is None:
        return DEFAULT_CACHE_SECONDS
    name, value = header
    seconds = int(value) if value.isascii() and value.isdigit() and len(value) < 7 else 0
    if not 1 <= seconds <= MAX_CACHE_SECONDS:
        raise BadRequest(f"`{name}` is a number of seconds from 1 to {MAX_CACHE_SECONDS}.", param=name)
    return seconds


async def send_stored_answer(stored: StoredReply, client: Client, more_headers: Mapping[str, str]) -> None:
    """Sends an answer that was stored, with what it was charged then (a cached one: nothing)."""
    answer = stored.answer
    body = answer.body(gateway_usage(stored.request_id, stored.tokens, stored.charge))
    # The charge is written anew: a cached answer costs nothing, whatever its first request cost.
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
) -> str | None:
    """The recorded answer, sealed for the database; None where it is too large, or cannot be sealed."""
    pieces = recording.pieces()
    if pieces is None:
        return None
    headers = {"content-type": content_type}
    if generation_id:
        headers["x-generation-id"] = generation_id
    try:
        return await StoredAnswer(200, headers, pieces).seal(vault)
    except Exception as error:  # whatever it was, the charge must not be lost with it
        log.error("answer_not_sealed", exc_info=error)
        return None
