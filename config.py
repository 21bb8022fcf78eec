"""Settings from the environment and .env, checked. Nothing else reads the environment.

Importing this module never fails. A wrong or missing setting becomes a sentence in `Configuration.problems`:
`/health` shows it, and every other route answers with 503.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from common.validation_messages import predicate

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Words = Annotated[tuple[str, ...], NoDecode]
Mode = Literal["live", "sandbox"]

SECRET_BYTES = 32
VERCEL_DEADLINE_SECONDS = 270.0


class Settings(BaseSettings):
    """Every setting; README and `.env.example` list them with the same defaults, and a test keeps the three
    in step.
    """

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True)

    openrouter_api_key: SecretStr | None = None
    openrouter_base_url: str = "https://openrouter.ai/api/v1"
    openrouter_site_url: str | None = None
    openrouter_site_name: str | None = None
    supabase_url: str | None = None
    supabase_key: SecretStr | None = None
    database_url: SecretStr | None = None
    gateway_data_dir: Path = Path(".gateway")
    gateway_mode: Mode | None = None
    postgres_bin: Path | None = None
    admin_api_key: SecretStr | None = None
    key_hash_secrets: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    encryption_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    cors_origins: Words = ("*",)
    trusted_proxies: Annotated[tuple[Network, ...], NoDecode] = ()
    registration: Literal["open", "closed"] | None = None
    signup_credits: Decimal | None = Field(default=None, ge=0, le=1_000_000_000, decimal_places=9)
    trial_days: int = Field(default=3, ge=0, le=36500)
    price_markup: Decimal = Field(default=Decimal(1), gt=0, le=1000)
    free_models: bool = False
    legacy_keys: bool = False
    default_max_output_tokens: int = Field(default=4096, ge=1)
    model_cache_ttl_seconds: int = Field(default=300, ge=1)
    max_body_bytes: int = Field(default=20 * 1024 * 1024, ge=1024)
    upstream_timeout_seconds: float = Field(default=300, gt=0)
    request_deadline_seconds: float = Field(default=600, gt=0)
    hold_ttl_seconds: int = Field(default=900, gt=0, le=86400)
    cron_secret: SecretStr | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    port: int = Field(default=8000, ge=0, le=65535)
    # Set by the platform itself, which sends the client's address in a header of its own.
    vercel: bool = False

    @field_validator("key_hash_secrets", "encryption_keys", "cors_origins", "trusted_proxies", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("log_level", "log_format", "registration", "gateway_mode", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("key_hash_secrets", "encryption_keys")
    @classmethod
    def _are_secrets(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for secret in value:
            decode_secret(secret.get_secret_value())
        return value

    @field_validator("database_url")
    @classmethod
    def _is_postgresql_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError(
                "must start with postgresql:// (and is not repeated here, as it may hold a password)"
            )
        if value is not None and "#" in value.get_secret_value():
            raise ValueError("holds a #, which ends an address: in a password write it as %23")
        return value

    @field_validator("supabase_url", "openrouter_base_url")
    @classmethod
    def _is_http_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must start with https:// or http://")
        return value.rstrip("/") if value else value

    @property
    def database(self) -> Literal["hosted", "url", "embedded"]:
        """Which of the three kinds of database the settings name."""
        if self.supabase_url or self.supabase_key:
            return "hosted"
        return "url" if self.database_url else "embedded"

    @property
    def mode(self) -> Mode | None:
        """Live with an OpenRouter key, sandbox on the embedded database, where nothing is sold by mistake.
        None where neither is safe to assume.
        """
        if self.gateway_mode:
            return self.gateway_mode
        if self.openrouter_api_key:
            return "live"
        return "sandbox" if self.database == "embedded" else None

    @property
    def deadline_seconds(self) -> float:
        """The longest that a request may take. On Vercel a function ends after 300 s, and settlement has to
        come before that.
        """
        longest = self.request_deadline_seconds
        return min(longest, VERCEL_DEADLINE_SECONDS) if self.vercel else longest

    @property
    def registration_open(self) -> bool:
        return self.registration == "open" if self.registration else self.mode == "sandbox"

    @property
    def credits_at_signup(self) -> Decimal:
        """In credits. Unless set: 10 play credits in sandbox mode, nothing in live mode."""
        if self.signup_credits is not None:
            return self.signup_credits
        return Decimal(10) if self.mode == "sandbox" else Decimal(0)


def decode_secret(text: str) -> bytes:
    """32 bytes from base64url, padded or not. Raises ValueError with a sentence that does not repeat the
    secret.
    """
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(
            "must be 32 bytes in base64url; make one with: openssl rand -base64 32 | tr '+/' '-_'"
        ) from None
    if len(raw) != SECRET_BYTES:
        raise ValueError(f"must be 32 bytes in base64url, not {len(raw)} bytes")
    return raw


@dataclass(frozen=True, slots=True)
class Configuration:
    """The settings as far as they could be read, and a sentence for each thing that is wrong with them."""

    settings: Settings
    problems: tuple[str, ...]


def load_configuration() -> Configuration:
    """Reads the environment and `.env`. A wrong value never raises: it becomes a problem, and all settings
    take their defaults.
    """
    try:
        settings = Settings()
    except UnicodeDecodeError:
        return _unreadable([".env is not a text file in UTF-8."])
    except ValidationError as error:
        # The input is left out: it may be a secret.
        problems = [
            f"{_names(finding['loc'])}: {predicate(finding)}."
            for finding in error.errors(include_input=False)
        ]
        return _unreadable(dict.fromkeys(problems))
    return Configuration(settings, tuple(_conflicts(settings)))


def _unreadable(problems: Iterable[str]) -> Configuration:
    return Configuration(Settings.model_construct(), tuple(problems))


def _names(loc: tuple[int | str, ...]) -> str:
    return str(loc[0]).upper() if loc else "settings"


def _conflicts(settings: Settings) -> Iterator[str]:
    """A sentence for each pair of settings that do not fit together, and for each that is missing."""
    yield from _deadline_conflicts(settings)
    if settings.gateway_mode == "live" and settings.openrouter_api_key is None:
        yield "OPENROUTER_API_KEY is missing: GATEWAY_MODE=live needs it."
    if bool(settings.supabase_url) != bool(settings.supabase_key):
        missing = "SUPABASE_KEY" if settings.supabase_url else "SUPABASE_URL"
        yield f"{missing} is missing: a hosted Supabase needs SUPABASE_URL and SUPABASE_KEY (the secret key)."
    if settings.admin_api_key is not None and len(settings.admin_api_key.get_secret_value()) < 16:
        yield "ADMIN_API_KEY is too short: use at least 16 characters."
    if settings.vercel and settings.database != "hosted":
        yield "SUPABASE_URL and SUPABASE_KEY are missing: on Vercel the data lives in a hosted Supabase."
    # The embedded database makes its own secrets; on Vercel it has nowhere to store them.
    if settings.database != "embedded" or settings.vercel:
        yield from _missing_secrets(settings)


def _deadline_conflicts(settings: Settings) -> Iterator[str]:
    least = settings.request_deadline_seconds + 60
    if settings.hold_ttl_seconds < least:
        yield (
            f"HOLD_TTL_SECONDS ({settings.hold_ttl_seconds}) must be at least REQUEST_DEADLINE_SECONDS + 60 "
            f"({least:g}): a hold must outlive its request."
        )


def _missing_secrets(settings: Settings) -> Iterator[str]:
    recipe = "make one with: openssl rand -base64 32 | tr '+/' '-_'"
    if not settings.key_hash_secrets:
        yield f"KEY_HASH_SECRETS is missing: API keys are stored as HMACs under it; {recipe}"
    if not settings.encryption_keys:
        yield f"ENCRYPTION_KEYS is missing: secrets at rest are encrypted with it; {recipe}"
    if settings.admin_api_key is None:
        yield "ADMIN_API_KEY is missing: admin routes need it; choose a long random text."
    if settings.mode is None:
        yield (
            "OPENROUTER_API_KEY is missing. Without it completions are answered by the sandbox, and on this "
            "database that must be asked for: set GATEWAY_MODE=sandbox."
        )
