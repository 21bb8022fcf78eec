"""Structured logging for our events and those of the libraries. Secrets are scrubbed from every line."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import orjson
import structlog

# API keys of the gateway, OpenRouter, OpenAI and Supabase, bearer tokens, and JSON web tokens.
SECRET = re.compile(
    r"(gw_(?:live|test|staging|dev|admin)_|sk-or-(?:v\d-)?|sk-|sb_secret_|Bearer\s+|eyJ[\w-]{10})[\w.~+/=-]{6,}"
)
# Both our events and the libraries' records get these fields.
SHARED_PROCESSORS: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def scrub(text: str) -> str:
    """The text with everything that looks like a key cut to its prefix."""
    return SECRET.sub(lambda match: match.group(1) + "***", text)


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
    """Sends our events and those of the libraries to standard output.

    `style` is `json`, for one JSON object a line, or `console`, for a person to read.
    """
    if style == "json":
        # Our own events are written as bytes, without a detour through text: requests log on the hot path.
        _configure_events(level, _render_line, structlog.BytesLoggerFactory(sys.stdout.buffer))
        _configure_libraries(structlog.processors.JSONRenderer(serializer=_to_json))
    else:
        console = structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())
        _configure_events(level, console, structlog.PrintLoggerFactory(sys.stdout))
        _configure_libraries(console)


def _configure_events(level: str, renderer: Any, logger_factory: Any) -> None:
    structlog.configure(
        # Scrubbing comes after the traceback has become text, so that no traceback leaks a key.
        processors=[*SHARED_PROCESSORS, structlog.processors.format_exc_info, _scrub_event, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=logger_factory,
        cache_logger_on_first_use=False,
    )


def _configure_libraries(renderer: Any) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=SHARED_PROCESSORS,
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
    # uvicorn's access lines contain the query string, which may hold a secret. Our request line says more.
    logging.getLogger("uvicorn.access").disabled = True
