"""The embedded Supabase: a PostgreSQL server, PostgREST's wire protocol and the migrations, with no second
service.

Nothing in here imports another module of the project, and nothing reads the environment.
"""

from .errors import EmbeddedDatabaseError

__all__ = ["EmbeddedDatabaseError"]
