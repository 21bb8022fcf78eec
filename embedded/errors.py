"""What is raised when the embedded Supabase cannot do its work."""

from __future__ import annotations


class EmbeddedDatabaseError(Exception):
    """The database cannot be used. The message is one sentence that says what is wrong and what to do about
    it.
    """
