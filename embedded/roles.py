"""Which roles Supabase expects in a database, and how they are made where a plain PostgreSQL lacks them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg

from .errors import EmbeddedDatabaseError

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

# https://github.com/supabase/postgres/blob/develop/migrations/db/init-scripts/00000000000000-initial-schema.sql
ROLES = {
    "anon": "nologin noinherit",
    "authenticated": "nologin noinherit",
    "service_role": "nologin noinherit bypassrls",
    "authenticator": "login noinherit",
}
API_ROLES = "anon, authenticated, service_role"

# The defaults of projects made before 2026: what somebody forgets to revoke is open, and a test can see it.
OLD_DEFAULT_PRIVILEGES = [
    f"grant usage on schema public to {API_ROLES}",
    *(
        f"alter default privileges in schema public grant all on {kind} to {API_ROLES}"
        for kind in ("tables", "functions", "sequences")
    ),
]


def bootstrap_statements() -> list[str]:
    """What turns a new cluster into what a Supabase project starts from, one statement each."""
    created = [f"create role {name} {options}" for name, options in ROLES.items()]
    return [*created, f"grant {API_ROLES} to authenticator", *OLD_DEFAULT_PRIVILEGES]


async def ensure_roles(connection: Connection) -> list[str]:
    """Creates those of Supabase's roles that are missing, and lets this login act as service_role.

    Returns the names of those it created. Raises EmbeddedDatabaseError where the login may not create them.
    """
    present = {row["rolname"] for row in await connection.fetch("select rolname from pg_catalog.pg_roles")}
    missing = [name for name in ROLES if name not in present]
    try:
        async with connection.transaction():
            for name in missing:
                await connection.execute(f"create role {name} {ROLES[name]}")
            await _grant_roles(connection)
    except asyncpg.InsufficientPrivilegeError as exc:
        raise EmbeddedDatabaseError(await _refusal(connection, missing, exc)) from exc
    return missing


async def _grant_roles(connection: Connection) -> None:
    """Grants only what is not yet there: on a hosted Supabase the login may not repeat these grants."""
    if not await connection.fetchval(
        "select pg_catalog.pg_has_role('authenticator', 'service_role', 'member')"
    ):
        await connection.execute(f"grant {API_ROLES} to authenticator")
    # Since version 16 who creates a role is a member of it without the right to act as it.
    acting = "set" if connection.get_server_version().major >= 16 else "member"
    if not await connection.fetchval("select pg_catalog.pg_has_role('service_role', $1)", acting):
        await connection.execute("grant service_role to current_user")
    if not await connection.fetchval(
        "select pg_catalog.has_schema_privilege('service_role', 'public', 'usage')"
    ):
        await connection.execute(f"grant usage on schema public to {API_ROLES}")


async def _refusal(connection: Connection, missing: list[str], reason: asyncpg.PostgresError) -> str:
    login = await connection.fetchval("select current_user")
    wanted = [f"create role {name} {ROLES[name]}" for name in missing]
    commands = "; ".join([*wanted, f"grant {API_ROLES} to authenticator, {login}"])
    return (
        f"The login {login} may not set up Supabase's roles ({reason.message}): run this once as an administrator of "
        f"the database, or use one: {commands};"
    )
