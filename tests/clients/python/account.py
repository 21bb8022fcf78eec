"""An account for one program of a client on the running gateway, and its books.

Also what the sandbox answers to the questions that the programs ask: its answers derive from the request
alone.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

URL = os.environ["CLIENTS_GATEWAY_URL"]
ADMIN_KEY = os.environ["CLIENTS_ADMIN_KEY"]
AWAITED = frozenset(json.loads(os.environ["CLIENTS_AWAITED"]))
WRONG_KEY = "gw_live_" + "1" * 49

MODEL = "openai/gpt-4o-mini"
CLAUDE = "anthropic/claude-haiku-4.5"
LONG = 400
ABORTABLE = f"{MODEL}:slow;ms=20;tokens={LONG}"
EMBEDDER = "openai/text-embedding-3-small"
UNKNOWN_MODEL = "nobody/no-such-model"

PROMPT = "Say hello."
READ = "The sandbox read “Say hello.”."
SAID = (
    f"{READ} Prices, tokens and shapes are those of the real service. "
    "Ask the same again and you get the same answer."
)
COST = 0.00002055
QUESTION = "Weather in Paris?"
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": WEATHER},
}
FORECAST = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "degrees": {"type": "integer"},
        "sky": {"type": "string", "enum": ["clear", "cloudy"]},
    },
    "required": ["city", "degrees", "sky"],
    "additionalProperties": False,
}
# One red pixel.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
IMAGE = f"data:image/png;base64,{PNG}"

_numbers = itertools.count()


def ask(method: str, path: str, key: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON answer of the gateway; raises HTTPError for a refusal."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(URL + path, data, headers, method=method)) as answer:
        return dict(json.load(answer))


@dataclass(frozen=True)
class Account:
    """A registered user and their key."""

    id: int
    key: str

    def records(self) -> list[dict[str, Any]]:
        return list(ask("GET", "/user/usage/records", self.key)["records"])

    def settled_record(self, number: int = 1, seconds: float = 10) -> dict[str, Any]:
        """The newest of exactly so many records, once none is pending."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.records()
            if len(found) == number and all(record["status"] != "pending" for record in found):
                return dict(found[0])
            assert time.monotonic() < deadline, found
            time.sleep(0.02)

    def spent(self) -> float:
        return float(sum(record["cost"] for record in self.records()))

    def limit(self, **limits: int | None) -> None:
        ask("POST", "/admin/limit", ADMIN_KEY, {"user_id": self.id, "rate_limits": limits})


def new_account(credits: float = 1) -> Account:
    """A user with so many credits, and without limits of rate."""
    name = f"client-{os.getpid()}-{next(_numbers)}"
    found = ask("POST", "/auth/register", ADMIN_KEY, {"username": name, "email": f"{name}@example.com"})
    account = Account(found["user_id"], found["api_key"])
    if credits:
        ask("POST", "/admin/add_credits", ADMIN_KEY, {"user_id": account.id, "credits": credits})
    units = ("requests", "tokens")
    account.limit(**{f"{unit}_per_{window}": None for unit in units for window in ("minute", "hour", "day")})
    return account


def model_that_makes(output: str) -> str:
    """The id of a model with this output modality."""
    with urllib.request.urlopen(f"{URL}/v1/models") as answer:
        models = json.load(answer)["data"]
    return str(next(model["id"] for model in models if output in model["architecture"]["output_modalities"]))


def assert_booked(
    record: Mapping[str, Any], *, prompt: int, completion: int, cost: float | None = None
) -> None:
    """The journal says what the client was told, and something was charged."""
    assert (record["status"], record["settlement_source"]) == ("completed", "usage")
    assert (record["prompt_tokens"], record["completion_tokens"]) == (prompt, completion)
    assert record["cost"] > 0
    assert cost is None or record["cost"] == cost


def assert_cut_short(record: Mapping[str, Any]) -> None:
    """The client left in mid-stream: charged, and for less than the whole answer."""
    assert record["status"] == "cancelled"
    assert 0 < record["completion_tokens"] < LONG
    assert record["cost"] > 0


def assert_left(record: Mapping[str, Any]) -> None:
    """The same where the stream does not say who serves it: then it is read to its end, as that provider may
    bill it whole.
    """
    assert record["status"] == "cancelled"
    assert 0 < record["completion_tokens"] <= LONG
    assert record["cost"] > 0
