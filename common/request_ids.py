"""UUIDv7 request ids. A UUIDv7 for each, so that the journal's primary key grows in order of time (RFC 9562,
section 5.7).
"""

from __future__ import annotations

import os
import time
from uuid import UUID

_VERSION_7 = 0x7 << 76
_VARIANT = 0b10 << 62
_RANDOM_A = ((1 << 12) - 1) << 64
_RANDOM_B = (1 << 62) - 1


def new_request_id() -> str:
    """A UUIDv7 of now, in its usual notation."""
    random = int.from_bytes(os.urandom(10), "big")
    milliseconds = time.time_ns() // 1_000_000
    return str(UUID(int=milliseconds << 80 | _VERSION_7 | random & _RANDOM_A | _VARIANT | random & _RANDOM_B))
