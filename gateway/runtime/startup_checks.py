"""Schema version, key secrets, mode and upstream key, checked before serving."""

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
    """Refuses a database that is older than the code, of another mode, or with keys that our secrets cannot
    recognise.
    """
    settings = runtime.settings
    version = await db.get_schema_version(runtime.client)
    if version < SCHEMA_VERSION:
        command = "supabase db push" if settings.database == "hosted" else "make migrate"
        raise Misconfigured(
            f"The database's schema is at version {version}, this code needs {SCHEMA_VERSION}. Run: {command}"
        )
    missing = await db_security.list_key_secrets_in_use(runtime.client) - set(runtime.keyring.ids)
    if missing:
        raise Misconfigured(
            "KEY_HASH_SECRETS lacks a secret that stored API keys still need: put the old one back, after the new one."
        )
    runtime.goes_live = runtime.mode == "live" and await db.get_mode(runtime.client) != "live"
    if runtime.goes_live:
        await _check_upstream_key(runtime)
    # Last, as there is no way back.
    mode = await db.enter_mode(runtime.client, runtime.mode)
    if mode["outcome"] == "refused":
        raise Misconfigured(
            "This database has been live and refuses sandbox mode: it would answer paying users with invented text. "
            "Set OPENROUTER_API_KEY, or, for a sandbox beside it, another database (GATEWAY_DATA_DIR or DATABASE_URL)."
        )


async def _check_upstream_key(runtime: Runtime) -> None:
    """Refuses to go live with a key that the upstream refuses: it would end all play credits, for nothing."""
    try:
        account = await runtime.upstream(None).read_account()
    except UpstreamUnavailable:
        return
    if account is None:
        raise Misconfigured(
            "OpenRouter refuses OPENROUTER_API_KEY. The database stays in sandbox mode until it takes the key."
        )


def for_operator(problem: GatewayError, settings: Settings) -> GatewayError:
    """What a database that does not answer at the start means to whoever set it up; the reason may hold names
    and goes to the log.
    """
    if not isinstance(problem, DatabaseUnavailable):
        return problem
    cause = problem.__cause__
    log.error("database_unreachable", reason=str(getattr(cause, "message", None) or cause))
    advice = {
        "hosted": "Check SUPABASE_URL and SUPABASE_KEY.",
        "url": "Check DATABASE_URL; a database that is new needs: make migrate.",
        "embedded": "The log in GATEWAY_DATA_DIR may say why.",
    }
    return DatabaseUnavailable(
        f"The gateway's database cannot be used yet. {advice[settings.database]} The gateway's log has the reason."
    )
