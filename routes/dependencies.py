"""What a route needs, as types: the running instance, a caller whose key may do this, an administrator.

Nothing here decides what a key may do: the database does.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer

import db_security
from common.errors import GatewayError, InvalidKey, MissingScope, RateLimited
from db_rows.keys import WrongSecret
from db_rows.shared import AdminStamp, CallerStamp, Environment, Scopes
from gateway.pricing.catalog import ModelIndex
from gateway.runtime.instance import Runtime
from gateway.runtime.service import Service
from routes.http.client_address import address_of, client_domain, user_agent_of
from routes.schemas.keys import Resource, Verb
from security import (
    LEGACY,
    Credential,
    address_subject,
    key_environment,
    masked,
    presented_key,
)

WRONG_SECRETS_PER_MINUTE = 10
REGISTRATION_KEYS = (
    "Registration takes no key, or an administrator's (ADMIN_API_KEY, or the key of an admin user with scope "
    "`admin`): leave out the one that you sent."
)
ADMINS_ONLY = "Admin routes need ADMIN_API_KEY, or the key of an admin user with scope `admin`."
NO_USER_KEY = (
    "This is not a user's API key of this gateway: the format or the checksum is wrong. "
    "(The administrator's serves /admin and registration only.)"
)
# What a secret may not write once it has been replaced: it may have been replaced because it was stolen.
NOT_IN_GRACE = ("keys", "account", "profile", "plan", "budgets", "webhooks")
IN_GRACE = (
    "This secret was replaced and is only in its grace period: use the new one for keys and the account."
)


def shown_environment(request: Request) -> str | None:
    """The environment that the prefix of a request's key names, or None; for routes without a key."""
    try:
        return key_environment(presented_key(request.headers))
    except GatewayError:
        return None


def read_credential(request: Request, runtime: Runtime) -> Credential:
    """The key of a request, checked for format only. Raises InvalidKey for what cannot be a key of ours."""
    key = presented_key(request.headers)
    environment = key_environment(key)
    return Credential(
        hashes=tuple(runtime.keyring.hashes(key)),
        secret_id=runtime.keyring.ids[0],
        legacy_hash=_legacy_hash(key, runtime) if environment is None else None,
        environment=environment,
        address=address_of(request, runtime),
        domain=client_domain(request.headers),
        user_agent=user_agent_of(request),
    )


def _legacy_hash(key: str, runtime: Runtime) -> str:
    """What an imported key is known by. Raises InvalidKey where it cannot be one."""
    if not (runtime.settings.legacy_keys and LEGACY.fullmatch(key)):
        # The administrator's key gets the same words: guesses are not counted here, so none may learn more.
        raise InvalidKey(NO_USER_KEY)
    return hashlib.sha256(key.encode()).hexdigest()


async def running(request: Request) -> Runtime:
    """The running instance. Raises Misconfigured or DatabaseUnavailable while there is none.

    A dependency is resolved before parameters and body are validated. Routes that need no key and check
    their parameters await it themselves, so that a wrong parameter gets its 400 while nothing can be served.
    """
    service: Service = request.app.state.service
    return await service.ready()


Running = Annotated[Runtime, Depends(running)]


@dataclass(frozen=True, slots=True)
class Caller:
    """A verified key and its user."""

    user_id: int
    key_id: int
    role: str
    environment: Environment
    key_name: str
    masked_key: str
    scopes: Scopes
    address: str
    user_agent: str | None
    request_id: str

    @property
    def actor(self) -> str:
        return f"key:{self.key_id}"

    def stamp(self) -> CallerStamp:
        """Who acts, with which key, from where: the fields that every change is made and recorded with."""
        return {
            "user_id": self.user_id,
            "maker_id": self.key_id,
            "actor": self.actor,
            "address": self.address,
            "user_agent": self.user_agent,
            "request_id": self.request_id,
        }


@dataclass(frozen=True, slots=True)
class Admin:
    """An administrator: ADMIN_API_KEY, or the key of an admin user with scope `admin`."""

    actor: str
    address: str
    user_agent: str | None
    request_id: str

    def stamp(self) -> AdminStamp:
        """Who did it, from where: the fields that every admin action is recorded with."""
        return {
            "actor": self.actor,
            "address": self.address,
            "user_agent": self.user_agent,
            "request_id": self.request_id,
        }


bearer_scheme = HTTPBearer(auto_error=False, description="An API key: `gw_...`", scheme_name="bearer")
header_scheme = APIKeyHeader(
    name="x-api-key", auto_error=False, description="The same key, as Anthropic's clients send it"
)
Declared = [Depends(bearer_scheme), Depends(header_scheme)]


async def verify_key(request: Request, runtime: Runtime, verb: Verb, resource: Resource) -> Caller:
    """The caller, after the database has said that the key may do this. Raises InvalidKey, Forbidden,
    DatabaseUnavailable.
    """
    credential = read_credential(request, runtime)
    request_id = request.state.request_id
    row = await runtime.verify(credential, request_id=request_id, verb=verb, resource=resource)
    # From here on every response says how much of the limits is left (middleware).
    request.state.limits = row["limits"]
    if row["outdated"] and (verb == "admin" or (verb == "write" and resource in NOT_IN_GRACE)):
        raise MissingScope(IN_GRACE)
    return Caller(
        user_id=row["user_id"],
        key_id=row["key_id"],
        role=row["role"],
        environment=row["environment"],
        key_name=row["key_name"],
        masked_key=masked(row["key_prefix"], row["last4"]),
        scopes=row["scopes"],
        address=credential.address,
        user_agent=credential.user_agent,
        request_id=request_id,
    )


def get_api_key(verb: Verb, resource: Resource) -> Any:
    """The dependency of a user's route: `Annotated[Caller, get_api_key("read", "usage")]`. The caller is
    verified, and their key has this scope.
    """

    async def dependency(request: Request, runtime: Running) -> Caller:
        return await verify_key(request, runtime, verb, resource)

    return Depends(dependency)


async def model_index(request: Request, runtime: Runtime) -> ModelIndex:
    """The models as a route without a key lists them: the sandbox's for a test key, else the upstream's."""
    return await runtime.catalog(shown_environment(request)).models()


async def optional_admin(request: Request) -> Admin | None:
    """The administrator whose key this request carries, None without a key. Raises for a key that is not an
    administrator's.
    """
    if "authorization" not in request.headers and "x-api-key" not in request.headers:
        return None
    try:
        # Only here: a request without a key learns what is wrong with its body before it learns that the
        # gateway cannot serve.
        return await require_admin(request, await running(request))
    except (InvalidKey, MissingScope) as refusal:
        raise type(refusal)(REGISTRATION_KEYS) from refusal


async def require_admin(request: Request, runtime: Running) -> Admin:
    """Raises InvalidKey without a valid key, MissingScope for a user's, RateLimited after ten wrong keys a
    minute from one address.
    """
    key = presented_key(request.headers)
    # In constant time: how long a comparison takes must not say how much of a guess is right.
    if hmac.compare_digest(key.encode(), runtime.admin_key.encode()):
        address = address_of(request, runtime)
        return Admin("admin", address, user_agent_of(request), request.state.request_id)
    try:
        caller = await verify_key(request, runtime, "admin", "*")
    except MissingScope as refusal:
        raise MissingScope(ADMINS_ONLY) from refusal
    except InvalidKey as refusal:
        await refuse_guesses(request, runtime, "INVALID_ADMIN_KEY")
        raise (InvalidKey(ADMINS_ONLY) if key_environment(key) is None else refusal) from refusal
    return Admin(caller.actor, caller.address, caller.user_agent, caller.request_id)


async def refuse_guesses(request: Request, runtime: Runtime, action: str) -> None:
    """Audits a wrong secret. Raises RateLimited for an address that has presented too many.

    It must be called for wrong secrets only. The right one works whatever others have tried, so nobody can
    lock the operator out.
    """
    result = await db_security.note_wrong_secret(runtime.client, _attempt(request, runtime, action))
    if result["outcome"] == "limited":
        raise RateLimited(
            "Too many wrong keys came from here.",
            code="too_many_wrong_keys",
            retry_after=result["retry_after"],
        )


def _attempt(request: Request, runtime: Runtime, action: str) -> WrongSecret:
    address = address_of(request, runtime)
    return {
        "action": action,
        "address": address,
        "address_subject": address_subject(address),
        "user_agent": user_agent_of(request),
        "request_id": request.state.request_id,
        "limit": WRONG_SECRETS_PER_MINUTE,
    }


AdminOnly = Annotated[Admin, Depends(require_admin)]
MaybeAdmin = Annotated[Admin | None, Depends(optional_admin)]
