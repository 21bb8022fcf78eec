"""Request ids, as UUIDv7 (RFC 9562, section 5.7).

They grow with time, so that new rows go to the end of a primary key's index.
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
    """A UUIDv7 of this moment, in its usual notation."""
    random = int.from_bytes(os.urandom(10), "big")
    milliseconds = time.time_ns() // 1_000_000
    return str(UUID(int=milliseconds << 80 | _VERSION_7 | random & _RANDOM_A | _VARIANT | random & _RANDOM_B))
