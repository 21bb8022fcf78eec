"""`python -m sandbox`. `python -m sandbox [--host 127.0.0.1] [--port 8787]`."""

import argparse
import socket
from contextlib import suppress

import uvicorn

from .app import create_app


class _Server(uvicorn.Server):
    """uvicorn, printing its address as soon as it listens (port 0 takes a free one)."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        shown = f"[{host}]" if ":" in host else host
        print(f"OPENROUTER_BASE_URL=http://{shown}:{port}/api/v1", flush=True)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m sandbox", description="An OpenRouter simulator.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8787)
    options = parser.parse_args()
    config = uvicorn.Config(
        create_app(), host=options.host, port=options.port, log_level="warning", access_log=False
    )
    with suppress(KeyboardInterrupt):  # after an orderly end uvicorn raises the signal once more
        _Server(config).run()


if __name__ == "__main__":
    main()
