"""The error that callers see when the embedded Supabase cannot work."""

from __future__ import annotations


class EmbeddedDatabaseError(Exception):
    """The database cannot be used. The message is one sentence: what is wrong, and what to do about it."""
