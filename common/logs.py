"""Structured logging, secrets scrubbed. Structured lines with the request's id, and nothing secret in them."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import orjson
import structlog

SECRET = re.compile(
    r"(gw_(?:live|test|staging|dev|admin)_|sk-or-(?:v\d-)?|sk-|sb_secret_|Bearer\s+|eyJ[\w-]{10})[\w.~+/=-]{6,}"
)


def scrub(text: str) -> str:
    """The text with everything that looks like a key cut to its prefix."""
    return SECRET.sub(lambda found: found.group(1) + "***", text)


def _scrub_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = scrub(value)
    return event


def _to_json(event: Any, **_rest: Any) -> str:
    return orjson.dumps(event, default=str).decode()


def _render_line(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> bytes:
    return orjson.dumps(event, default=str)


def configure_logging(level: str, style: str) -> None:
    """Sends our events and those of the libraries to standard output, as JSON lines or for a person's eyes."""
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())
        if style == "console"
        else structlog.processors.JSONRenderer(serializer=_to_json)
    )
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    lines = style == "json"
    structlog.configure(
        processors=[
            *shared,
            structlog.processors.format_exc_info,
            _scrub_event,
            _render_line if lines else renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.BytesLoggerFactory(sys.stdout.buffer)
        if lines
        else structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                _scrub_event,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    # Its lines hold the request's query string, and ours say more.
    logging.getLogger("uvicorn.access").disabled = True
