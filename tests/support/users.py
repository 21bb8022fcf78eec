"""What tests do as users: call an endpoint, make a narrower key, ask for a quote; and requests whose cost is
unknown.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from tests.support.gateway import Gateway, User

# A key of the user's own for OpenRouter, as it would look.
PROVIDER_KEY = "sk-or-v1-" + "0123456789abcdef" * 4

CHAT_BODY = {
    "model": "openai/gpt-4o-mini",
    "messages": [{"role": "user", "content": "Say hello."}],
    "max_tokens": 50,
}


async def ask(user: User, method: str, path: str, body: Any = None) -> Any:
    return await user.gateway.http.request(method, path, headers=user.headers, json=body)


async def scoped(user: User, scopes: dict[str, list[str]], **rules: Any) -> User:
    """The same user with another key."""
    body = {"key_name": f"key {uuid4()}", "scope_permissions": scopes, **rules}
    made = await user.gateway.http.post("/user/api-keys", headers=user.headers, json=body)
    assert made.status_code == 200, made.text
    return User(user.gateway, user.id, made.json()["api_key"])


async def quote(user: User, body: dict[str, Any], **headers: str) -> Any:
    return await user.gateway.http.post("/v1/quote", headers={**user.headers, **headers}, json=body)


async def make_unknown(gateway: Gateway, user: User, request_id: str, **columns: Any) -> None:
    """As if a crash had left neither usage nor an answer of the upstream's when this request was settled."""
    sets = "".join(f", {name} = ${number}" for number, name in enumerate(columns, 3))
    async with gateway.database.owner() as owner, owner.transaction():
        await owner.execute("alter table public.usage_records disable trigger all")
        await owner.execute(
            "update public.users set credits_nanos = credits_nanos + (select cost_nanos "
            "from public.usage_records where request_id = $2) "
            "where id = $1",
            user.id,
            request_id,
        )
        await owner.execute(
            "update public.usage_records set settlement_source = 'none', status = 'expired', "
            "cost_nanos = 0, upstream_cost_nanos = 0"
            f"{sets} where user_id = $1 and request_id = $2",
            user.id,
            request_id,
            *columns.values(),
        )
        await owner.execute("alter table public.usage_records enable trigger all")
    await gateway.database.assert_books_balance()
