"""What does somebody see who has just started the gateway? Where it is, in which mode, and two lines to paste."""

from __future__ import annotations

from runtime import Service

REGISTER = """curl -s {url}/auth/register -H 'Content-Type: application/json' \\
  -d '{{"username": "me", "email": "me@example.com"}}'"""
REGISTER_CLOSED = """curl -s {url}/auth/register -H 'Authorization: Bearer ADMIN_KEY' -H 'Content-Type: application/json' \\
  -d '{{"username": "me", "email": "me@example.com"}}'"""
COMPLETE = """curl -s {url}/v1/chat/completions -H 'Authorization: Bearer API_KEY' -H 'Content-Type: application/json' \\
  -d '{{"model": "openai/gpt-4o-mini", "messages": [{{"role": "user", "content": "Say hello."}}]}}'"""

MODES = {
    "sandbox": "sandbox: answers are invented, credits are play money, nothing is sent to OpenRouter\n"
    "               (set OPENROUTER_API_KEY to go live)",
    "live": "live: requests go to OpenRouter and cost credits",
}


def welcome(service: Service) -> str:
    """The first screen."""
    settings, runtime = service.settings, service.runtime
    if runtime is None:
        reason = service.problem.message if service.problem else "unknown"
        return f"\nThe gateway is up, but cannot serve:\n  {reason}\n"
    url = f"http://127.0.0.1:{settings.port}"
    lines = [
        "",
        "AI Gateway",
        f"  base URL     {url}/v1",
        f"  mode         {MODES[runtime.mode]}",
        f"  API docs     {url}/docs",
    ]
    if runtime.secrets is not None and runtime.secrets.is_new and settings.admin_api_key is None:
        lines.append(f"  admin key    {runtime.secrets.admin_api_key}   (shown once; kept in {settings.gateway_data_dir / 'secrets.json'})")
    register = REGISTER if settings.registration_open else REGISTER_CLOSED
    lines += ["", "Register a user (the answer holds API_KEY):", "", register.format(url=url)]
    lines += ["", "Then ask for a completion:", "", COMPLETE.format(url=url), ""]
    return "\n".join(lines)


def print_welcome(service: Service) -> None:
    """Prints the first screen, except on a platform where nobody sits in front of it."""
    if not service.settings.vercel:
        print(welcome(service), flush=True)
