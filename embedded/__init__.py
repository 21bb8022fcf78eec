"""The embedded Supabase: a PostgreSQL server, PostgREST's wire protocol and the migrations, in one process.

Nothing in here may import another part of the project or read the environment.
"""

from .errors import EmbeddedDatabaseError

__all__ = ["EmbeddedDatabaseError"]
