"""Addresses that sent unknown keys lately: their next key is verified before the body is read.

Reading and bounding a large body takes far longer than looking a key up, and looking the key up together with
the admission saves a round trip. So bodies are read first, except from an address that sent a key which does
not exist: no address can keep this process busy that way.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cachetools import TTLCache

from security import address_subject

REMEMBERED_SECONDS = 60.0
MAX_REMEMBERED = 10_000


class UnknownKeys:
    """Remembers the latest ten thousand such addresses, each for a minute after its last unknown key.

    Keys that exist are remembered for a minute, too, since honest clients may share an address with dishonest
    ones: theirs are looked up first once a minute, and not with each request.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._addresses = TTLCache[str, bool, float](MAX_REMEMBERED, REMEMBERED_SECONDS, clock)
        self._known_keys = TTLCache[str, bool, float](MAX_REMEMBERED, REMEMBERED_SECONDS, clock)

    def add(self, address: str) -> None:
        """Records that an unknown key came from this address."""
        self._addresses[address_subject(address)] = True

    def clear(self, key_hash: str) -> None:
        """Records that this key exists."""
        if self._addresses:  # else nobody is suspect, and nothing needs to be remembered
            self._known_keys[key_hash] = True

    def is_suspect(self, address: str, key_hash: str) -> bool:
        """Whether this key is to be looked up before anything else is done for it."""
        # The first condition spares the usual request, with no suspect anywhere, the parsing of its address.
        return (
            bool(self._addresses)
            and address_subject(address) in self._addresses
            and key_hash not in self._known_keys
        )
