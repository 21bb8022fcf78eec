"""What is checked before an instance serves: schema version, key secrets, mode, and the operator's upstream
key.
"""

from __future__ import annotations

import structlog

import db
import db_security
from common.errors import DatabaseUnavailable, GatewayError, Misconfigured, UpstreamUnavailable
from config import Settings
from gateway.runtime.instance import Runtime
from supabase_config import SCHEMA_VERSION

log = structlog.get_logger("runtime")


async def check_database(runtime: Runtime) -> None:
    """Raises Misconfigured for a database that is older than the code, that is of another mode, or whose keys
    our secrets cannot recognise. A live instance takes a sandbox's database live.
    """
    await _check_schema(runtime)
    await _check_key_secrets(runtime)
    runtime.goes_live = runtime.mode == "live" and await db.get_mode(runtime.client) != "live"
    if runtime.goes_live:
        await _check_upstream_key(runtime)
    # Last, because going live cannot be undone.
    await _enter_mode(runtime)


async def _check_schema(runtime: Runtime) -> None:
    version = await db.get_schema_version(runtime.client)
    if version < SCHEMA_VERSION:
        command = "supabase db push" if runtime.settings.database == "hosted" else "make migrate"
        raise Misconfigured(
            f"The database's schema is at version {version}, this code needs {SCHEMA_VERSION}. Run: {command}"
        )


async def _check_key_secrets(runtime: Runtime) -> None:
    if await db_security.list_key_secrets_in_use(runtime.client) - set(runtime.keyring.ids):
        raise Misconfigured(
            "KEY_HASH_SECRETS lacks a secret that stored API keys still need: "
            "put the old one back, after the new one."
        )


async def _enter_mode(runtime: Runtime) -> None:
    entry = await db.enter_mode(runtime.client, runtime.mode)
    if entry["outcome"] == "refused":
        raise Misconfigured(
            "This database has been live and refuses sandbox mode: "
            "it would answer paying users with invented text. "
            "Set OPENROUTER_API_KEY, or, for a sandbox beside it, another database "
            "(GATEWAY_DATA_DIR or DATABASE_URL)."
        )


async def _check_upstream_key(runtime: Runtime) -> None:
    """Refuses to go live with a key that the upstream refuses: it would end all play credits, for nothing."""
    try:
        account = await runtime.upstream(None).read_account()
    except UpstreamUnavailable:
        return  # an outage of the upstream must not keep the gateway down
    if account is None:
        raise Misconfigured(
            "OpenRouter refuses OPENROUTER_API_KEY. "
            "The database stays in sandbox mode until it takes the key."
        )


ADVICE = {
    "hosted": "Check SUPABASE_URL and SUPABASE_KEY.",
    "url": "Check DATABASE_URL; a database that is new needs: make migrate.",
    "embedded": "The log in GATEWAY_DATA_DIR may say why.",
}


def for_operator(problem: GatewayError, settings: Settings) -> GatewayError:
    """A start-up problem as the operator is told it. The reason of a database that does not answer may hold
    names and goes to the log only.
    """
    if not isinstance(problem, DatabaseUnavailable):
        return problem
    cause = problem.__cause__
    log.error("database_unreachable", reason=str(getattr(cause, "message", None) or cause))
    return DatabaseUnavailable(
        f"The gateway's database cannot be used yet. {ADVICE[settings.database]} "
        "The gateway's log has the reason."
    )
