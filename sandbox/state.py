"""The memory of one instance: calls, generations and the bill, all bounded.

No price may depend on it: `/generation` reads the cost from the id, so that another instance can answer.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TypeVar

import orjson

from sandbox.models.market import Market

from .bill import Bill, Charge
from .generation import FOREVER, Generation, decode
from .wire import Connection

MAX_GENERATIONS = 10_000
MAX_CALLS = 200
MAX_KEPT_BODY = 32 * 1024
# `/sandbox/calls` needs no key, so that it must not show any.
SECRET_HEADERS = frozenset({"authorization", "x-api-key", "cookie"})

_Value = TypeVar("_Value")


@dataclass(slots=True)
class Call:
    """One request, as it arrived, and what became of it."""

    method: str
    path: str
    raw_headers: list[tuple[bytes, bytes]]
    raw_body: bytes = b""
    status: int | None = None
    generation_id: str | None = None
    cost: Decimal | None = None
    cancelled: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """The headers without secrets."""
        pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.raw_headers]
        return {name: value for name, value in pairs if name not in SECRET_HEADERS}

    @property
    def body(self) -> object:
        """The parsed body; None when there was none, or it was not JSON, or it was too large to keep."""
        try:
            return orjson.loads(self.raw_body)
        except orjson.JSONDecodeError:
            return None

    def keep_body(self, raw: bytes) -> None:
        """Remembers the body unless it is large."""
        self.raw_body = raw if len(raw) <= MAX_KEPT_BODY else b""

    def render(self) -> dict[str, object]:
        return {
            "method": self.method,
            "path": self.path,
            "headers": self.headers,
            "body": self.body,
            "status": self.status,
            "id": self.generation_id,
            "cost": self.cost,
            "cancelled": self.cancelled,
        }


class State:
    """The memory of one instance."""

    def __init__(self) -> None:
        self.market = Market()
        self.bill = Bill()
        self.generations: OrderedDict[str, Generation] = OrderedDict()
        self.in_flight: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.calls: deque[Call] = deque(maxlen=MAX_CALLS)
        self._lookups: OrderedDict[str, int] = OrderedDict()

    @property
    def billed(self) -> Decimal:
        """US dollars billed so far. Setting it starts a new bill at that amount."""
        return self.bill.total

    @billed.setter
    def billed(self, amount: Decimal) -> None:
        self.bill = Bill(amount)

    def open_call(self, connection: Connection, path: str) -> Call:
        """Records a request on its arrival."""
        call = Call(connection.method, path, connection.raw_headers)
        self.counts[path] += 1
        self.calls.append(call)
        return call

    def begin(self, call: Call, generation_id: str) -> None:
        """Records the start of a generation, whose cost nobody can know yet."""
        call.generation_id = generation_id
        self.in_flight.add(generation_id)

    def end(self, call: Call, generation: Generation) -> None:
        """Bills a generation, however it has ended."""
        if call.generation_id is None:
            raise ValueError("this call has no generation")
        self.in_flight.discard(call.generation_id)
        _keep(self.generations, call.generation_id, generation)
        charge = Charge(call.generation_id, generation.cost, call.path, _status(generation))
        self.bill.add(charge, generation.upstream_cost, datetime.now(UTC))
        call.cost, call.cancelled = generation.cost, generation.cancelled

    def find(self, generation_id: str) -> Generation | None:
        """What `/generation` may say now. A late generation is missed as often as its id says."""
        # OpenRouter knows a generation only once it has ended: clients get a 404 until then.
        if generation_id in self.in_flight:
            return None
        generation = self.generations.get(generation_id) or decode(generation_id)
        if generation is None or not generation.late_lookups:
            return generation
        lookups = self._lookups.get(generation_id, 0) + 1
        _keep(self._lookups, generation_id, lookups)
        return generation if FOREVER > generation.late_lookups < lookups else None

    def reset(self) -> None:
        """Forgets calls and counts, and takes back risen prices. Generations and the bill stay."""
        self.market.calm()
        self.counts.clear()
        self.calls.clear()

    def render(self) -> Mapping[str, object]:
        return {
            "counts": dict(self.counts),
            "billed": self.billed,
            "calls": [call.render() for call in self.calls],
        }


def _status(generation: Generation) -> str:
    if generation.cancelled:
        return "cancelled"
    return "failed" if generation.finish == "error" else "completed"


def _keep(store: OrderedDict[str, _Value], key: str, value: _Value) -> None:
    store[key] = value
    if len(store) > MAX_GENERATIONS:
        store.popitem(last=False)
