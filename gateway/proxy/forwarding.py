"""Sends a request upstream and relays a plain, binary or streamed answer. JSON in, the same bytes out unless
something must be hidden.
"""

from __future__ import annotations

import re

from common.errors import UpstreamError
from gateway.proxy.dialects.base import AnswerState
from gateway.proxy.dialects.chat import Dialect
from gateway.proxy.outcome import Outcome
from gateway.proxy.sse import BOM
from gateway.upstream.errors import RequestOrigin, error_from_upstream, error_status, sanitised_error
from gateway.upstream.usage import parse_json, read_generation_id

BYTES = re.compile(r"audio/[a-z0-9.+-]+(?:; ?[a-z]+=[a-z0-9]+)*|application/octet-stream", re.IGNORECASE)
ANY_BYTES = "application/octet-stream"


def read_answer(raw: bytes, dialect: Dialect, outcome: Outcome, origin: RequestOrigin) -> bytes:
    """The answer as the client gets it; notes in `outcome` what it says of itself.

    Raises UpstreamError for what is no JSON object, and the GatewayError that an error in it means (see
    `error_from_upstream`).
    """
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
        status = error_status(dialect.error_of(error)) if isinstance(error, dict) else None
        raise error_from_upstream(status or 502, {}, raw, origin)
    outcome.completed = not dialect.has_failed(state)
    return dialect.without_secrets(raw, sanitised_error)


def bytes_type(content_type: str | None) -> str:
    """The content type of an answer that is no text. Raises UpstreamError for one that is not sound."""
    if content_type is None:
        return ANY_BYTES
    if not BYTES.fullmatch(content_type):
        raise UpstreamError("The model provider's answer is not audio.")
    return content_type
