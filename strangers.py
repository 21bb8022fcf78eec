"""Whose key is looked up before their body is read? That of an address which has presented invented keys lately.

To read and bound a large body takes a hundred times as long as to look a key up, and to look it up with the admission is one round trip
less. So everybody is read first, except from where a key came that does not exist: nobody can keep this process busy that way.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from addresses import address_subject

REMEMBERED_SECONDS = 60.0
MAX_REMEMBERED = 10_000


class Strangers:
    """The addresses, for a minute each; of more than ten thousand the latest."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: OrderedDict[str, float] = OrderedDict()

    def note(self, address: str) -> None:
        """An invented key came from here."""
        subject = address_subject(address)
        self._until[subject] = self._clock() + REMEMBERED_SECONDS
        self._until.move_to_end(subject)
        if len(self._until) > MAX_REMEMBERED:
            self._until.popitem(last=False)

    def __contains__(self, address: str) -> bool:
        return bool(self._until) and self._until.get(address_subject(address), 0.0) > self._clock()
