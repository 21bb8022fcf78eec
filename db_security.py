"""API keys and the audit log in the database: flat functions, one per query or SQL function.

Keys arrive here as HMACs, computed elsewhere: this module never sees one in clear.
"""

from __future__ import annotations

from supabase_config import AsyncClient, call


async def list_key_secrets_in_use(client: AsyncClient) -> set[str]:
    """Ids of the HMAC secrets that stored keys still need; dropping one of them would lock its keys out."""
    return set(await call(client, "key_secrets_in_use", {}))
