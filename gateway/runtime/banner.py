"""The first screen in a terminal: where the gateway is, its mode, and commands for a first completion."""

from __future__ import annotations

from gateway.runtime.instance import Runtime
from gateway.runtime.service import Service

JSON = "-H 'Content-Type: application/json'"
KEY_ONLY = """sed -E 's/.*"api_key":"([^"]*)".*/\\1/'"""
NEW_USER = """'{{"username": "me-'$(date +%s)'", "email": "me-'$(date +%s)'@example.com"}}'"""
REGISTER = (
    "API_KEY=$(curl -s {url}/auth/register {admin}{json} -d " + NEW_USER + ' | {key_only}); echo "$API_KEY"'
)
COMPLETE = (
    """curl -s {url}/v1/chat/completions -H "Authorization: Bearer $API_KEY" {json} """
    """-d '{{"model": "openai/gpt-4o-mini", "messages": [{{"role": "user", "content": "Say hello."}}]}}'"""
)
GRANT = """curl -s {url}/admin/add_credits {admin}{json} -d '{{"api_key": "'$API_KEY'", "credits": 1}}'"""
ADMIN = '-H "Authorization: Bearer $ADMIN_API_KEY" '

MODES = {
    "sandbox": "sandbox: answers are invented, credits are play money, nothing is sent to OpenRouter\n"
    "               (set OPENROUTER_API_KEY to go live)",
    "live": "live: requests go to OpenRouter and cost credits",
}
WENT_LIVE = "\n               (from now on, for good: play credits have ended)"


def welcome(service: Service) -> str:
    """The first screen."""
    runtime, url = service.runtime, service.url
    if runtime is None:
        return _cannot_serve(service)
    mode = f"  mode         {MODES[runtime.mode]}{WENT_LIVE if runtime.goes_live else ''}"
    if url is None:
        return "\n".join(["", "AI Gateway", mode, *_admin_key(runtime), ""])
    addresses = [f"  base URL     {url}/v1", mode, f"  API docs     {url}/docs"]
    return "\n".join(["", "AI Gateway", *addresses, *_admin_key(runtime), "", *_lines_to_paste(runtime, url)])


def _cannot_serve(service: Service) -> str:
    reason = service.problem.message if service.problem else "unknown"
    lines = [f"  {line}" for line in reason.splitlines()]
    return "\n".join(["", "The gateway is up, but cannot serve:", *lines, ""])


def _admin_key(runtime: Runtime) -> list[str]:
    """The administrator's key, on the one start that made it."""
    secrets, settings = runtime.secrets, runtime.settings
    if secrets is None or not secrets.is_new or settings.admin_api_key is not None:
        return []
    where = settings.gateway_data_dir / "secrets.json"
    return [f"  admin key    {secrets.admin_api_key}", f"               (shown once; kept in {where})"]


def _lines_to_paste(runtime: Runtime, url: str) -> list[str]:
    """Commands that register a user, grant credits where there are none, and make a completion."""
    is_open = runtime.settings.registration_open
    parts = {"url": url, "json": JSON, "key_only": KEY_ONLY, "admin": "" if is_open else ADMIN}
    register = "Register a user:" if is_open else _register_as_administrator(runtime)
    lines = [register, "", REGISTER.format(**parts), ""]
    if not runtime.settings.credits_at_signup:
        lines += ["Grant them a credit:", "", GRANT.format(**{**parts, "admin": ADMIN}), ""]
    return [*lines, "Ask for a completion:", "", COMPLETE.format(**parts), ""]


def _register_as_administrator(runtime: Runtime) -> str:
    where = ""
    if runtime.secrets and not runtime.settings.admin_api_key:
        where = f", which is in {runtime.settings.gateway_data_dir / 'secrets.json'}"
    return f"Register a user (ADMIN_API_KEY is your admin key{where}):"


def print_welcome(service: Service) -> None:
    """Prints the first screen, except on a platform where nobody sits in front of it."""
    if not service.settings.vercel:
        print(welcome(service), flush=True)
