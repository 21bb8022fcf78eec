"""A simulator of OpenRouter's API as an ASGI app. It must never call another service.

In process: `SandboxTransport(create_app())` for an httpx2 client. As a server: `python -m sandbox`.
"""

from .app import Sandbox, create_app
from .scenarios import SCENARIOS
from .transport import SandboxTransport

__all__ = ["SCENARIOS", "Sandbox", "SandboxTransport", "create_app"]
