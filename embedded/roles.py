"""The roles that Supabase expects in a database, and their creation where a plain PostgreSQL lacks them."""

from __future__ import annotations

import asyncpg

from .asyncpg_types import Connection
from .errors import EmbeddedDatabaseError

# https://github.com/supabase/postgres/blob/develop/migrations/db/init-scripts/00000000000000-initial-schema.sql
ROLES = {
    "anon": "nologin noinherit",
    "authenticated": "nologin noinherit",
    "service_role": "nologin noinherit bypassrls",
    "authenticator": "login noinherit",
}
API_ROLES = "anon, authenticated, service_role"

# The default privileges of projects made before 2026. With these a table whose rights a migration forgets to
# revoke is open to everybody, so that a test can notice it.
OLD_DEFAULT_PRIVILEGES = [
    f"grant usage on schema public to {API_ROLES}",
    *(
        f"alter default privileges in schema public grant all on {kind} to {API_ROLES}"
        for kind in ("tables", "functions", "sequences")
    ),
]


def bootstrap_statements() -> list[str]:
    """The statements that give a new cluster what a Supabase project starts from."""
    created = [f"create role {name} {options}" for name, options in ROLES.items()]
    return [*created, f"grant {API_ROLES} to authenticator", *OLD_DEFAULT_PRIVILEGES]


async def ensure_roles(connection: Connection) -> list[str]:
    """Creates the missing roles, lets this login act as service_role, and returns the names of the new roles.

    Raises EmbeddedDatabaseError where the login may not create roles.
    """
    present = {row["rolname"] for row in await connection.fetch("select rolname from pg_catalog.pg_roles")}
    missing = [name for name in ROLES if name not in present]
    try:
        # All or nothing: a half-made set of roles would look complete to the next run.
        async with connection.transaction():
            for name in missing:
                await connection.execute(f"create role {name} {ROLES[name]}")
            await _grant_roles(connection)
    except asyncpg.InsufficientPrivilegeError as exc:
        raise EmbeddedDatabaseError(await _advice(connection, missing, exc)) from exc
    return missing


async def _grant_roles(connection: Connection) -> None:
    """Grants only what is missing: on a hosted Supabase the login may not repeat these grants."""
    if not await _holds(connection, "pg_has_role('authenticator', 'service_role', 'member')"):
        await connection.execute(f"grant {API_ROLES} to authenticator")
    # Since PostgreSQL 16 whoever creates a role is a member of it, without the right to act as it (`set`).
    privilege = "set" if connection.get_server_version().major >= 16 else "member"
    if not await _holds(connection, f"pg_has_role('service_role', '{privilege}')"):
        await connection.execute("grant service_role to current_user")
    if not await _holds(connection, "has_schema_privilege('service_role', 'public', 'usage')"):
        await connection.execute(f"grant usage on schema public to {API_ROLES}")


async def _holds(connection: Connection, check: str) -> bool:
    """The result of one of PostgreSQL's access privilege inquiry functions."""
    return bool(await connection.fetchval(f"select pg_catalog.{check}"))


async def _advice(connection: Connection, missing: list[str], reason: asyncpg.PostgresError) -> str:
    """The sentence that names the commands which an administrator has to run instead."""
    login = await connection.fetchval("select current_user")
    creations = [f"create role {name} {ROLES[name]}" for name in missing]
    commands = "; ".join([*creations, f"grant {API_ROLES} to authenticator, {login}"])
    return (
        f"The login {login} may not set up Supabase's roles ({reason.message}): run this once as an "
        f"administrator of the database, or use one: {commands};"
    )
