"""asyncpg's generic types with their parameter filled in.

They are strings because asyncpg's classes can be subscripted in its stubs only, not at run time.
"""

from __future__ import annotations

from typing import TypeAlias

import asyncpg

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
# A pool lends connections out behind a proxy, which refuses to work once the connection was given back.
PooledConnection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
