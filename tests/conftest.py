"""The fixtures of `tests.support.gateway`, for every test below this folder."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.support.gateway import (
    database,
    gateway,
    live_gateway,
    postgres,
    postgres_15,
    sql,
    stage,
    start_gateway,
    upstream,
)

# How fast a machine is says nothing of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
collect_ignore = [
    "clients"
]  # what `make clients` runs: other people's packages, in environments of their own

__all__ = [
    "database",
    "gateway",
    "live_gateway",
    "postgres",
    "postgres_15",
    "sql",
    "stage",
    "start_gateway",
    "upstream",
]
