"""An upstream that answers like OpenRouter, fast enough not to hide the gateway's own speed.

`python -m benchmarks.mock_upstream PORT` serves GET /api/v1/models (the sandbox's priced models) and POST
.../chat/completions, plain or streamed: 42 events, a write for each, without a pause between them. A
`seed` in the body paces the events. GET /api/v1/generation knows what a stream cost that was cut off.

It reads no more of HTTP than wrk, nginx and the gateway send: a content-length, keep-alive, no pipelining.
"""

from __future__ import annotations

import asyncio
import os
import sys
from decimal import Decimal
from itertools import count

import orjson
import uvloop

from sandbox.models.catalog import list_models

MODEL = "openai/gpt-4o-mini"
PROMPT_TOKENS, COMPLETION_TOKENS = 20, 40
# 20 x $0.15 + 40 x $0.60 for a million tokens each.
COST_NANOS = 27_000
EVENTS = 42
PACE_SECONDS = 0.02

_numbers = count(1)


def _usage() -> dict[str, object]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": COMPLETION_TOKENS,
        "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
        "cost": orjson.Fragment(format(Decimal(COST_NANOS).scaleb(-9), "f")),
        "is_byok": False,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _native_usage() -> dict[str, object]:
    return {
        "native_tokens_prompt": PROMPT_TOKENS,
        "native_tokens_completion": COMPLETION_TOKENS,
        "total_cost": _usage()["cost"],
    }


def _shared(kind: str) -> dict[str, object]:
    return {"id": "gen-ID", "provider": "OpenAI", "model": MODEL, "object": kind, "created": 1_750_000_000}


def _completion() -> bytes:
    text = "All that glitters is not gold. " * 4
    message = {"role": "assistant", "content": text, "refusal": None, "reasoning": None}
    choice = {
        "logprobs": None,
        "finish_reason": "stop",
        "native_finish_reason": "stop",
        "index": 0,
        "message": message,
    }
    return orjson.dumps({**_shared("chat.completion"), "choices": [choice], "usage": _usage()})


def _event(content: str, finish_reason: str | None, **rest: object) -> bytes:
    choice = {
        "index": 0,
        "delta": {"role": "assistant", "content": content},
        "finish_reason": finish_reason,
        "native_finish_reason": finish_reason,
        "logprobs": None,
    }
    event = {**_shared("chat.completion.chunk"), "choices": [choice], **rest}
    return b"data: " + orjson.dumps(event) + b"\n\n"


def _events() -> list[bytes]:
    words = [_event(f" word{number}", None) for number in range(EVENTS - 3)]
    return [*words, _event("", "stop"), _event("", None, usage=_usage()), b"data: [DONE]\n\n"]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


MODELS = orjson.dumps({"data": list_models({"output_modalities": "all"}, Decimal(1))})
GENERATION = orjson.dumps({"data": {"id": "gen-ID", **_native_usage()}})
COMPLETION = _completion()
CHUNKS = [_chunk(event) for event in _events()]
CHUNKS[-1] += b"0\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\nx-generation-id: gen-%d\r\n%b\r\n\r\n"


class MockUpstream(asyncio.Protocol):
    """One keep-alive connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._loop = asyncio.get_running_loop()
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        self._rest += data
        head, blank, body = self._rest.partition(b"\r\n\r\n")
        if not blank or len(body) < _content_length(head):
            return
        self._rest = b""
        if head.startswith(b"GET"):
            self._answer_whole(GENERATION if b"/generation?" in head else MODELS)
        elif b'"stream":true' in body:
            self._start_stream(PACE_SECONDS if b'"seed"' in body else 0.0)
        else:
            self._answer_whole(COMPLETION)

    def _answer_whole(self, body: bytes) -> None:
        length = b"content-length: %d" % len(body)
        self._transport.write(HEAD % (b"application/json", next(_numbers), length) + body)

    def _start_stream(self, pace: float) -> None:
        self._transport.write(HEAD % (b"text/event-stream", next(_numbers), b"transfer-encoding: chunked"))
        if pace:
            self._write_event(0, pace)
        else:
            self._loop.call_soon(self._write_all)

    def _write_all(self) -> None:
        """Writes all events, each with a write of its own; the socket's buffer has room for all of them.

        Through the transport, uvloop would join them into one.
        """
        if self._transport.is_closing():
            return
        descriptor = self._transport.get_extra_info("socket").fileno()
        for chunk in CHUNKS:
            os.write(descriptor, chunk)

    def _write_event(self, position: int, pace: float) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(CHUNKS[position])
        if position + 1 < len(CHUNKS):
            self._loop.call_later(pace, self._write_event, position + 1, pace)


def _content_length(head: bytes) -> int:
    _, _, after = head.lower().partition(b"content-length:")
    return int(after.partition(b"\r\n")[0] or 0)


async def serve(port: int) -> None:
    """Serves on 127.0.0.1 until the process is ended."""
    server = await asyncio.get_running_loop().create_server(MockUpstream, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
