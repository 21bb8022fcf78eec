"""The fixtures of `tests.support`, for every test below this folder."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.support.database import database, postgres, postgres_15, sql
from tests.support.gateway import gateway, live_gateway, refusing, stage, start_gateway
from tests.support.receiver import certificate, names, receiver, trusting
from tests.support.upstream import upstream

# How fast a machine is says nothing of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
# `make clients` runs these: other people's packages, in environments of their own.
collect_ignore = ["clients"]

__all__ = [
    "certificate",
    "database",
    "gateway",
    "live_gateway",
    "names",
    "postgres",
    "postgres_15",
    "receiver",
    "refusing",
    "sql",
    "stage",
    "start_gateway",
    "trusting",
    "upstream",
]
