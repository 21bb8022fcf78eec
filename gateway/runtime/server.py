"""Serves the gateway with uvicorn on 127.0.0.1 and PORT, for `make run`.

Under another server a wrong setting becomes an answer. Here it ends the process: whoever started it
can mend it.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gateway.runtime.service import Service

HOST = "127.0.0.1"


def serve(app: FastAPI, service: Service) -> None:
    """Serves until it is interrupted. Ends the process with a sentence where a setting is wrong or the port
    cannot be had.
    """
    if service.configuration.problems:
        sys.exit("\n".join(service.configuration.problems))
    listener = _listen(service.settings.port)
    service.url = f"http://{HOST}:{listener.getsockname()[1]}"
    # Imported here: it needs httptools, which may be missing where another server serves the gateway.
    from gateway.runtime.bounded_headers import BoundedHeads

    config = uvicorn.Config(
        app, http=BoundedHeads, proxy_headers=False, access_log=False, log_level="warning"
    )
    # After an orderly end uvicorn raises the signal once more.
    with suppress(KeyboardInterrupt):
        _Server(config).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says what an interrupt waits for. A second interrupt ends the process at once, without a traceback for
    each request that it drops.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        running = len(self.server_state.tasks)
        if self.should_exit and sig == signal.SIGINT:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
            _tell("Stopped. The sweep charges what was running once its cost is known.")
        elif running:
            are_running = "request is" if running == 1 else "requests are"
            _tell(f"Waiting: {running} {are_running} running. Ctrl-C stops at once.")
        super().handle_exit(sig, frame)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _listen(port: int) -> socket.socket:
    # With the protocol named: asyncio turns Nagle's algorithm off only where it knows that this is TCP.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        sys.exit(
            f"Port {port} of {HOST} cannot be used ({error.strerror}). "
            f"Choose another one: PORT={port + 1} make run"
        )
    listener.listen(2048)
    return listener
