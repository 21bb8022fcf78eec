"""The PostgreSQL programs that tests run on: the wheel's, and Debian's 15 where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
QUICK = {"fsync": "off"}
INSTALLATIONS = [
    pytest.param(None, id="wheel"),
    pytest.param(
        DEBIAN_15, id="system-15", marks=pytest.mark.skipif(not DEBIAN_15.exists(), reason="not installed")
    ),
]
