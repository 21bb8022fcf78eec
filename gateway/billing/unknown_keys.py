"""Addresses that sent unknown keys lately: their next key is verified before the body is read. That of an
address which has presented invented keys lately.

To read and bound a large body takes far longer than to look a key up, and to look it up with the admission is
one round trip less. So everybody is read first, except from where a key came that does not exist: one address
cannot keep this process busy that way.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from security import address_subject

REMEMBERED_SECONDS = 60.0
MAX_REMEMBERED = 10_000


class UnknownKeys:
    """The addresses, for a minute each; of more than ten thousand the latest. So are keys that were looked up
    there and found, since honest ones may share an address with invented ones: they are looked up first once
    a minute.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._addresses: OrderedDict[str, float] = OrderedDict()
        self._keys: OrderedDict[str, float] = OrderedDict()

    def add(self, address: str) -> None:
        """An invented key came from here."""
        self._remember(self._addresses, address_subject(address))

    def clear(self, key_hash: str) -> None:
        """A key exists."""
        if self._addresses:
            self._remember(self._keys, key_hash)

    def is_suspect(self, address: str, key_hash: str) -> bool:
        """Whether this key is to be looked up first."""
        if not self._addresses:
            return False
        now = self._clock()
        return self._addresses.get(address_subject(address), 0.0) > now >= self._keys.get(key_hash, 0.0)

    def _remember(self, kept: OrderedDict[str, float], name: str) -> None:
        kept[name] = self._clock() + REMEMBERED_SECONDS
        kept.move_to_end(name)
        if len(kept) > MAX_REMEMBERED:
            kept.popitem(last=False)
