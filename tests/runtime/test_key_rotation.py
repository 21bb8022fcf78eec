"""The secret that keys are stored under can be replaced while two instances serve, by the steps of
docs/key-rotation.md.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.database import Database
from tests.support.gateway import Gateway, User, running_gateway

OLD, NEW = (base64.urlsafe_b64encode(bytes([n]) * 32).decode() for n in (1, 2))
DOCUMENT = ROOT / "docs" / "key-rotation.md"


class Fleet:
    """Two instances on one database, deployed anew one after the other."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database, self._folder = database, folder
        self._stacks = [AsyncExitStack(), AsyncExitStack()]
        self.instances: list[Gateway] = []

    async def deploy(self, number: int, secrets: str) -> Gateway:
        await self._stacks[number].aclose()
        running = running_gateway(
            self._database, gateway_data_dir=self._folder / str(number), key_hash_secrets=secrets
        )
        gateway = await self._stacks[number].enter_async_context(running)
        self.instances[number : number + 1] = [gateway]
        return gateway

    async def aclose(self) -> None:
        for stack in self._stacks:
            await stack.aclose()

    async def statuses(self, key: str) -> list[int]:
        """What each instance answers to a key, asked twice around, as uses move keys from one secret to
        another.
        """
        found = []
        for gateway in self.instances * 2:
            found.append(
                (
                    await gateway.http.get("/user/balance", headers={"authorization": f"Bearer {key}"})
                ).status_code
            )
        return found


@pytest.fixture
async def fleet(database: Database, tmp_path: Path) -> AsyncIterator[Fleet]:
    made = Fleet(database, tmp_path)
    for number in (0, 1):
        await made.deploy(number, OLD)
    yield made
    await made.aclose()


async def make(user: User, gateway: Gateway, name: str) -> dict[str, Any]:
    response = await gateway.http.post("/user/api-keys", headers=user.headers, json={"key_name": name})
    assert response.status_code == 200, response.text
    return dict(response.json())


async def test_every_key_works_on_both_instances_at_every_moment_of_a_rotation(fleet: Fleet) -> None:
    user = await fleet.instances[0].register()
    keys = [user.key]
    for step, secrets in enumerate((f"{OLD},{NEW}", f"{NEW},{OLD}"), 1):
        for number in (0, 1):  # in between, one instance is a step behind the other
            gateway = await fleet.deploy(number, secrets)
            keys.append((await make(user, gateway, f"step {step} of instance {number}"))["api_key"])
            for key in keys:
                assert await fleet.statuses(key) == [200] * 4, (step, number)
    for number in (0, 1):
        gateway = await fleet.deploy(number, NEW)
        assert (await gateway.http.get("/health")).json()["status"] == "healthy"
    for key in keys:
        assert await fleet.statuses(key) == [200] * 4


async def test_the_old_secret_may_not_go_while_a_key_still_needs_it(fleet: Fleet) -> None:
    user = await fleet.instances[0].register()
    idle = await make(user, fleet.instances[0], "never used")
    for secrets in (f"{OLD},{NEW}", f"{NEW},{OLD}"):
        for number in (0, 1):
            await fleet.deploy(number, secrets)
    assert await fleet.statuses(user.key) == [200] * 4
    early = await fleet.deploy(0, NEW)
    response = await early.http.get("/health")
    assert response.status_code == 503 and "KEY_HASH_SECRETS" in response.json()["problem"]
    (query,) = [part.split("```")[0] for part in DOCUMENT.read_text().split("```sql")[1:]]
    needs = {row["hash_secret_id"]: row["array_agg"] for row in await early.database.rows(query)}
    assert [idle["key"]["id"]] in needs.values() and len(needs) == 2
    other = fleet.instances[1]
    await other.admin("DELETE", f"/admin/keys/{idle['key']['id']}")
    late = await fleet.deploy(0, NEW)
    assert (await late.http.get("/health")).status_code == 200
    assert await fleet.statuses(user.key) == [200] * 4


async def test_in_one_step_the_instance_that_is_behind_would_refuse_a_key(fleet: Fleet) -> None:
    """Why there are two steps."""
    user = await fleet.instances[0].register()
    ahead = await fleet.deploy(0, f"{NEW},{OLD}")
    assert (await ahead.http.get("/user/balance", headers=user.headers)).status_code == 200
    behind = fleet.instances[1]
    assert (await behind.http.get("/user/balance", headers=user.headers)).status_code == 401
