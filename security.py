"""API keys (format, checksum, HMACs), encryption at rest, and what a request presents; no database.

The database gets HMACs of keys, and a ciphertext of one that can be revealed; never a key in clear.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from starlette.datastructures import Headers

from common.errors import BadRequest, InvalidKey
from config import decode_secret

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PREFIXES = {"live": "gw_live_", "test": "gw_test_", "staging": "gw_staging_", "development": "gw_dev_"}
ENVIRONMENTS = {prefix: environment for environment, prefix in PREFIXES.items()}
SECRET_LENGTH, CHECKSUM_LENGTH = 43, 6
KEY = re.compile(
    rf"(gw_(?:live|test|staging|dev)_)[0-9A-Za-z]{{{SECRET_LENGTH}}}[0-9A-Za-z]{{{CHECKSUM_LENGTH}}}"
)
LEGACY = re.compile(r"[\x21-\x7e]{16,256}")
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
    """A key as it is shown after its creation."""
    return f"{prefix}...{last4}"


class StoredKey(TypedDict):
    """What may be stored of a key: how it is shown, and an HMAC by which it is found."""

    key_name: str
    key_prefix: str
    last4: str
    key_hash: str
    hash_secret_id: str
    environment_tag: str


class Keyring:
    """HMACs of keys under each of our secrets. New keys are stored under the first."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._secrets = [decode_secret(text) for text in texts]
        self.ids = [
            hashlib.sha256(b"key hash secret\0" + secret).hexdigest()[:16] for secret in self._secrets
        ]

    def hashes(self, key: str) -> list[str]:
        """Hex HMAC-SHA256 of the whole key, one per secret, the current first."""
        return [hmac.digest(secret, key.encode(), "sha256").hex() for secret in self._secrets]

    def email_hashes(self, email: str) -> list[str]:
        """Hex HMACs by which an email address is recognised without being stored, one per secret, the current
        first.
        """
        message = b"signup email\0" + email.casefold().encode()
        return [hmac.new(secret, message, hashlib.sha256).hexdigest() for secret in self._secrets]

    def pseudonym(self, text: str) -> str:
        """A name for `text` that nobody can make or recognise without our secret."""
        return hmac.digest(self._secrets[0], b"pseudonym\0" + text.encode(), "sha256").hex()[:32]

    def tenant_pseudonym(self, user_id: int, text: str) -> str:
        """A stable name for what belongs to one tenant; it tells the upstream nothing about the tenant."""
        return self.pseudonym(f"{user_id}\0{text}")

    def stored(self, key: str, environment: str, name: str) -> StoredKey:
        """What the database stores of a new key."""
        return {
            "key_name": name,
            "key_prefix": PREFIXES[environment],
            "last4": key[-4:],
            "key_hash": self.hashes(key)[0],
            "hash_secret_id": self.ids[0],
            "environment_tag": environment,
        }


class Vault:
    """Encryption (Fernet) of what must be readable again. The first key encrypts, all of them decrypt."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._fernet = MultiFernet([Fernet(text + "=" * (-len(text) % 4)) for text in texts])
        # Tells which key encrypts, and nothing about the key itself.
        self.current_id = hashlib.sha256(b"encryption key\0" + texts[0].encode()).hexdigest()

    def encrypt(self, text: str) -> str:
        return self.encrypt_bytes(text.encode())

    def decrypt(self, token: str) -> str | None:
        """The text, or None when none of our keys made this token."""
        data = self.decrypt_bytes(token)
        return None if data is None else data.decode()

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
    """A key as it was presented, in the only form that may be passed on: hashes, and where it came from."""

    hashes: tuple[str, ...]
    secret_id: str
    legacy_hash: str | None
    environment: str | None
    address: str
    domain: str | None
    user_agent: str | None

    def item(self) -> dict[str, Any]:
        """The fields of an admission item that say whose request it is."""
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
    """The key of `Authorization: Bearer` or `x-api-key`. Raises InvalidKey without one, BadRequest for two
    different ones.
    """
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    bearer = bearer.strip() if scheme.lower() == "bearer" else ""
    other = headers.get("x-api-key", "").strip()
    if bearer and other and not hmac.compare_digest(bearer.encode(), other.encode()):
        raise BadRequest("`Authorization` and `x-api-key` hold different keys. Send one.", param="x-api-key")
    if not (bearer or other):
        raise InvalidKey(
            f"{'`Authorization` has no `Bearer` key' if scheme else 'No API key'}. "
            "Send it as `Authorization: Bearer gw_...`."
        )
    return bearer or other


def printable_header(value: str | None, length: int) -> str | None:
    """Header text that may be stored: bounded, and without what PostgreSQL or a log cannot take."""
    return "".join(c for c in value if c.isprintable())[:length] if value else None


def address_subject(address: str) -> str:
    """What limits by address count: an IPv4 address, or the whole /64 that one IPv6 host usually has."""
    ip = ipaddress.ip_address(address)
    return str(ipaddress.ip_network((ip, 64), strict=False)) if ip.version == 6 else address
