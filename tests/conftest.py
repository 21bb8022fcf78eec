"""The fixtures of `rig`, for every test below this folder."""

from __future__ import annotations

from rig import database, gateway, live_gateway, postgres, postgres_15, sql, stage, start_gateway, upstream

collect_ignore = ["clients"]  # what `make clients` runs: other people's packages, in environments of their own

__all__ = ["database", "gateway", "live_gateway", "postgres", "postgres_15", "sql", "stage", "start_gateway", "upstream"]
