"""Runs the simulator as a server: `python -m sandbox [--host 127.0.0.1] [--port 8787]`."""

import argparse
import socket
from contextlib import suppress

import uvicorn

from .app import create_app


class _Server(uvicorn.Server):
    """uvicorn that prints its address as soon as it listens. Port 0 takes a free port."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        name = f"[{host}]" if ":" in host else host
        # Flushed, because the programs that start us wait for this line.
        print(f"OPENROUTER_BASE_URL=http://{name}:{port}/api/v1", flush=True)


def main() -> None:
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m sandbox", description="An OpenRouter simulator.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8787)
    options = parser.parse_args()
    config = uvicorn.Config(
        create_app(), host=options.host, port=options.port, log_level="warning", access_log=False
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again after an orderly end
        _Server(config).run()


if __name__ == "__main__":
    main()
