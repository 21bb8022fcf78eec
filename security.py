"""Who is calling, and may they? Key format, HMAC, Fernet, and the dependencies of the routes.

A raw key never leaves this module: what goes on to the database is an HMAC of it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import Headers

from addresses import address_subject, client_address, client_domain
from config import decode_secret
from errors import BadRequest, GatewayError, InvalidKey, MissingScope, RateLimited

if TYPE_CHECKING:
    from runtime import Runtime

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PREFIXES = {"live": "gw_live_", "test": "gw_test_", "staging": "gw_staging_", "development": "gw_dev_"}
ENVIRONMENTS = {prefix: environment for environment, prefix in PREFIXES.items()}
SECRET_LENGTH, CHECKSUM_LENGTH = 43, 6
KEY = re.compile(rf"(gw_(?:live|test|staging|dev)_)[0-9A-Za-z]{{{SECRET_LENGTH}}}[0-9A-Za-z]{{{CHECKSUM_LENGTH}}}")
LEGACY = re.compile(r"[\x21-\x7e]{16,256}")
WRONG_SECRETS_PER_MINUTE = 10
REGISTRATION_KEYS = (
    "Registration takes no key, or an administrator's (ADMIN_API_KEY, or the key of an admin user with scope `admin`): "
    "leave out the one that you sent."
)
ADMINS_ONLY = "Admin routes need ADMIN_API_KEY, or the key of an admin user with scope `admin`."
NOT_IN_GRACE = ("keys", "account", "profile", "plan", "budgets", "webhooks")
DEFAULT_SCOPES: dict[str, list[str]] = {"read": ["*"], "write": ["*"]}


def _base62(number: int, length: int) -> str:
    digits = []
    while number:
        number, digit = divmod(number, 62)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits)).rjust(length, "0")


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), CHECKSUM_LENGTH)


def new_key(environment: str) -> str:
    """A fresh key: prefix, 32 random bytes and a CRC-32 of everything before it, both in base62."""
    text = PREFIXES[environment] + _base62(int.from_bytes(secrets.token_bytes(32), "big"), SECRET_LENGTH)
    return text + _checksum(text)


def key_environment(key: str) -> str | None:
    """The environment of a well-formed key, or None: most typing errors end here, before any query."""
    match = KEY.fullmatch(key)
    if match is None or not hmac.compare_digest(_checksum(key[:-CHECKSUM_LENGTH]), key[-CHECKSUM_LENGTH:]):
        return None
    return ENVIRONMENTS[match.group(1)]


def masked(prefix: str, last4: str) -> str:
    """A key as it may be shown after its creation."""
    return f"{prefix}...{last4}"


class Keyring:
    """HMACs of keys under each of our secrets; the first is the one that new keys are stored under."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._secrets = [decode_secret(text) for text in texts]
        self.ids = [hashlib.sha256(b"key hash secret\0" + secret).hexdigest()[:16] for secret in self._secrets]

    def hashes(self, key: str) -> list[str]:
        """Hex HMAC-SHA256 of the whole key, one per secret, the current first."""
        return [hmac.digest(secret, key.encode(), "sha256").hex() for secret in self._secrets]

    def email_hashes(self, email: str) -> list[str]:
        """What an email address is remembered by without being kept: hex HMACs, one per secret, the current first."""
        message = b"signup email\0" + email.casefold().encode()
        return [hmac.new(secret, message, hashlib.sha256).hexdigest() for secret in self._secrets]

    def pseudonym(self, text: str) -> str:
        """A name for `text` that nobody without our secret can make or recognise."""
        return hmac.digest(self._secrets[0], b"pseudonym\0" + text.encode(), "sha256").hex()[:32]

    def stored(self, key: str, environment: str, name: str) -> dict[str, Any]:
        """What the database keeps of a new key."""
        return {
            "key_name": name,
            "key_prefix": PREFIXES[environment],
            "last4": key[-4:],
            "key_hash": self.hashes(key)[0],
            "hash_secret_id": self.ids[0],
            "environment_tag": environment,
        }


class Vault:
    """Encryption of what must be readable again; the first key encrypts, all of them decrypt."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._fernet = MultiFernet([Fernet(text + "=" * (-len(text) % 4)) for text in texts])
        # Which key encrypts, without saying anything of it.
        self.current_id = hashlib.sha256(b"encryption key\0" + texts[0].encode()).hexdigest()

    def encrypt(self, text: str) -> str:
        return self.encrypt_bytes(text.encode())

    def decrypt(self, token: str) -> str | None:
        """The text, or None when none of our keys made this token."""
        found = self.decrypt_bytes(token)
        return None if found is None else found.decode()

    def encrypt_bytes(self, data: bytes) -> str:
        return self._fernet.encrypt(data).decode()

    def decrypt_bytes(self, token: str) -> bytes | None:
        """The bytes, or None when none of our keys made this token."""
        try:
            return self._fernet.decrypt(token.encode())
        except InvalidToken:
            return None


# What a request presents.


@dataclass(frozen=True, slots=True)
class Credential:
    """A key as it was presented, in the only form that may go on: hashes, and where it came from."""

    hashes: tuple[str, ...]
    secret_id: str
    legacy_hash: str | None
    environment: str | None
    address: str
    domain: str | None
    user_agent: str | None

    def item(self) -> dict[str, Any]:
        """The fields of an admission item that say who is asking."""
        return {
            "hashes": self.hashes,
            "secret_id": self.secret_id,
            "legacy_hash": self.legacy_hash,
            "prefix_environment": self.environment,
            "address": self.address,
            "domain": self.domain,
            "user_agent": self.user_agent,
        }


def presented_key(headers: Headers) -> str:
    """The key of `Authorization: Bearer` or `x-api-key`. Raises InvalidKey without one, BadRequest for two different ones."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    bearer = bearer.strip() if scheme.lower() == "bearer" else ""
    other = headers.get("x-api-key", "").strip()
    if bearer and other and not hmac.compare_digest(bearer.encode(), other.encode()):
        raise BadRequest("`Authorization` and `x-api-key` hold different keys. Send one.", param="x-api-key")
    if not (bearer or other):
        raise InvalidKey(
            f"{'No API key' if not scheme else '`Authorization` has no `Bearer` key'}. Send it as `Authorization: Bearer gw_...`."
        )
    return bearer or other


def shown_environment(request: Request) -> str | None:
    """The environment that a key's prefix names, where a request shows a key; for routes that need none."""
    try:
        return key_environment(presented_key(request.headers))
    except GatewayError:
        return None


def printable_header(value: str | None, length: int) -> str | None:
    """Header text as it may be stored: bounded, and without what PostgreSQL or a log would choke on."""
    return "".join(c for c in value if c.isprintable())[:length] if value else None


def read_credential(request: Request, runtime: Runtime) -> Credential:
    """The key of a request, checked for format only. Raises InvalidKey for what cannot be a key of ours."""
    key = presented_key(request.headers)
    environment = key_environment(key)
    legacy = None
    if environment is None:
        if not (runtime.settings.legacy_keys and LEGACY.fullmatch(key)):
            # The administrator's gets the same words: here nobody counts who guesses it.
            raise InvalidKey(
                "This is not a user's API key of this gateway: the format or the checksum is wrong. "
                "(The administrator's serves /admin and registration only.)"
            )
        legacy = hashlib.sha256(key.encode()).hexdigest()
    return Credential(
        hashes=tuple(runtime.keyring.hashes(key)),
        secret_id=runtime.keyring.ids[0],
        legacy_hash=legacy,
        environment=environment,
        address=address_of(request, runtime),
        domain=client_domain(request.headers),
        user_agent=printable_header(request.headers.get("user-agent"), 512),
    )


def address_of(request: Request, runtime: Runtime) -> str:
    peer = request.client.host if request.client else None
    settings = runtime.settings
    return client_address(request.headers, peer, settings.trusted_proxies, on_vercel=settings.vercel)


# Dependencies: what a route needs is a type.


@dataclass(frozen=True, slots=True)
class Caller:
    """A verified key and its user."""

    user_id: int
    key_id: int
    role: str
    environment: str
    key_name: str
    masked_key: str
    scopes: Mapping[str, Any]
    address: str
    user_agent: str | None
    request_id: str

    @property
    def actor(self) -> str:
        return f"key:{self.key_id}"

    def stamp(self) -> dict[str, Any]:
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

    def stamp(self) -> dict[str, Any]:
        """Who did it, from where: the fields that every admin action is recorded with."""
        return {
            "actor": self.actor,
            "address": self.address,
            "user_agent": self.user_agent,
            "request_id": self.request_id,
        }


bearer_scheme = HTTPBearer(auto_error=False, description="An API key: `gw_...`", scheme_name="bearer")
header_scheme = APIKeyHeader(name="x-api-key", auto_error=False, description="The same key, as Anthropic's clients send it")
Declared = [Depends(bearer_scheme), Depends(header_scheme)]


async def verified(request: Request, verb: str, resource: str) -> Caller:
    """The caller, after the database has said that the key may do this. Raises InvalidKey, Forbidden, DatabaseUnavailable."""
    runtime: Runtime = await request.app.state.runtime.ready()
    credential = read_credential(request, runtime)
    request_id = request.state.request_id
    found = await runtime.verify(credential, request_id=request_id, verb=verb, resource=resource)
    # Whatever is answered from here on says what is left of the limits (middleware).
    request.state.limits = found["limits"]
    if found["outdated"] and (verb == "admin" or (verb == "write" and resource in NOT_IN_GRACE)):
        raise MissingScope("This secret was replaced and is only in its grace period: use the new one for keys and the account.")
    return Caller(
        user_id=found["user_id"],
        key_id=found["key_id"],
        role=found["role"],
        environment=found["environment"],
        key_name=found["key_name"],
        masked_key=masked(found["key_prefix"], found["last4"]),
        scopes=found["scopes"],
        address=credential.address,
        user_agent=credential.user_agent,
        request_id=request_id,
    )


def may(verb: str, resource: str) -> Any:
    """The dependency of a user's route: `Annotated[Caller, may("read", "usage")]`."""

    async def dependency(request: Request) -> Caller:
        return await verified(request, verb, resource)

    return Depends(dependency)


async def optional_admin(request: Request) -> Admin | None:
    """The administrator whose key this request carries, None without a key. Raises for a key that is not an administrator's."""
    if "authorization" not in request.headers and "x-api-key" not in request.headers:
        return None
    try:
        return await require_admin(request)
    except (InvalidKey, MissingScope) as refusal:
        raise type(refusal)(REGISTRATION_KEYS) from refusal


async def require_admin(request: Request) -> Admin:
    """Raises InvalidKey without a valid key, MissingScope for a user's, RateLimited after ten wrong keys a minute from one address."""
    runtime: Runtime = await request.app.state.runtime.ready()
    key = presented_key(request.headers)
    address = address_of(request, runtime)
    agent = printable_header(request.headers.get("user-agent"), 512)
    if hmac.compare_digest(key.encode(), runtime.admin_key.encode()):
        return Admin("admin", address, agent, request.state.request_id)
    try:
        caller = await verified(request, "admin", "*")
    except MissingScope as refusal:
        raise MissingScope(ADMINS_ONLY) from refusal
    except InvalidKey as refusal:
        await refuse_guesses(request, runtime, "INVALID_ADMIN_KEY")
        raise (InvalidKey(ADMINS_ONLY) if key_environment(key) is None else refusal) from refusal
    return Admin(caller.actor, address, agent, caller.request_id)


async def refuse_guesses(request: Request, runtime: Runtime, action: str) -> None:
    """Audits a wrong secret. Raises RateLimited for an address that has presented too many.

    Only ever called for a wrong one: a right one works whatever others have tried, so nobody can lock the operator out.
    """
    address = address_of(request, runtime)
    found = await runtime.note_wrong_secret(
        {
            "action": action,
            "address": address,
            "address_subject": address_subject(address),
            "user_agent": printable_header(request.headers.get("user-agent"), 512),
            "request_id": request.state.request_id,
            "limit": WRONG_SECRETS_PER_MINUTE,
        }
    )
    if found["outcome"] == "limited":
        raise RateLimited("Too many wrong keys came from here.", code="too_many_wrong_keys", retry_after=found["retry_after"])


AdminOnly = Annotated[Admin, Depends(require_admin)]
MaybeAdmin = Annotated[Admin | None, Depends(optional_admin)]
