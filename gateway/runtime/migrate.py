"""`python -m gateway.runtime.migrate`. Applies the migrations that it lacks: to DATABASE_URL, or to the
embedded database.
"""

from __future__ import annotations

import asyncio
import sys

from common.errors import GatewayError
from config import load_configuration
from embedded import EmbeddedDatabaseError
from supabase_config import migrate_database


def main() -> int:
    """Prints what was applied; returns the exit status."""
    try:
        applied = asyncio.run(migrate_database(load_configuration().settings))
    except (GatewayError, EmbeddedDatabaseError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(f"applied {name}" for name in applied) or "The database is up to date.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
