"""The package's face. A simulator of its API as an ASGI app.

In process: `SandboxTransport(create_app())` for an httpx2 client. As a server: `python -m sandbox`.
"""

from .app import Sandbox, create_app
from .scenarios import SCENARIOS
from .transport import SandboxTransport

__all__ = ["SCENARIOS", "Sandbox", "SandboxTransport", "create_app"]
