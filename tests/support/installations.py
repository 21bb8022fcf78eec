"""Which PostgreSQL programs do these tests run on? The wheel's, and Debian's 15 where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

SYSTEM_15 = Path("/usr/lib/postgresql/15/bin")
QUICK = {"fsync": "off"}
INSTALLATIONS = [
    pytest.param(None, id="wheel"),
    pytest.param(
        SYSTEM_15, id="system-15", marks=pytest.mark.skipif(not SYSTEM_15.exists(), reason="not installed")
    ),
]
