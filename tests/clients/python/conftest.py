"""An account for each test, and no test of what the gateway does not have yet."""

from __future__ import annotations

import pytest
from account import AWAITED, Account, new_account


@pytest.fixture(autouse=True)
def needed_endpoint(request: pytest.FixtureRequest) -> None:
    for marker in request.node.iter_markers("endpoint"):
        if marker.args[0] in AWAITED:
            pytest.skip(f"awaits {marker.args[0]}")


@pytest.fixture
def account() -> Account:
    """A user with 1 credit."""
    return new_account()
