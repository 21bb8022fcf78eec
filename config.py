"""Settings from the environment and .env, checked; the only reader of the environment. The settings, and the
only place that reads the environment.

Importing this module never fails: a wrong or missing setting becomes one sentence in
`Configuration.problems`, which `/health` shows and every other route answers with 503.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
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
    # Set by the platform itself: there the client's address arrives in its own header.
    vercel: bool = False

    @field_validator("key_hash_secrets", "encryption_keys", "cors_origins", "trusted_proxies", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

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
        """Which of the three databases is meant."""
        if self.supabase_url or self.supabase_key:
            return "hosted"
        return "url" if self.database_url else "embedded"

    @property
    def mode(self) -> Mode | None:
        """Live with an OpenRouter key, sandbox where nothing can be sold by mistake, None when neither is
        safe to assume.
        """
        if self.gateway_mode:
            return self.gateway_mode
        if self.openrouter_api_key:
            return "live"
        return "sandbox" if self.database == "embedded" else None

    @property
    def deadline_seconds(self) -> float:
        """The longest request; on Vercel a function ends after 300 s, and settlement has to come before."""
        return (
            min(self.request_deadline_seconds, VERCEL_DEADLINE_SECONDS)
            if self.vercel
            else self.request_deadline_seconds
        )

    @property
    def registration_open(self) -> bool:
        return self.registration == "open" if self.registration else self.mode == "sandbox"

    @property
    def credits_at_signup(self) -> Decimal:
        """In credits: 10 play credits in sandbox mode and nothing in live mode, unless set."""
        if self.signup_credits is not None:
            return self.signup_credits
        return Decimal(10) if self.mode == "sandbox" else Decimal(0)


def decode_secret(text: str) -> bytes:
    """32 bytes out of base64url, padded or not. Raises ValueError with a sentence that does not repeat the
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
    """The settings as far as they could be read, and what is wrong with them, a sentence each."""

    settings: Settings
    problems: tuple[str, ...]


def load_configuration() -> Configuration:
    """Reads the environment and `.env`. Never raises for a wrong value: that is a problem, and its setting
    takes the default.
    """
    problems: list[str] = []
    try:
        settings = Settings()
    except UnicodeDecodeError:
        problems = [".env is not a text file in UTF-8."]
        settings = Settings.model_construct()
    except ValidationError as error:
        problems = list(
            dict.fromkeys(
                f"{_names(found['loc'])}: {predicate(found)}." for found in error.errors(include_input=False)
            )
        )
        settings = Settings.model_construct()
    return Configuration(settings, (*problems, *(_conflicts(settings) if not problems else ())))


def _names(loc: tuple[int | str, ...]) -> str:
    return str(loc[0]).upper() if loc else "settings"


def _conflicts(settings: Settings) -> list[str]:
    found = []
    if settings.hold_ttl_seconds < settings.request_deadline_seconds + 60:
        found.append(
            f"HOLD_TTL_SECONDS ({settings.hold_ttl_seconds}) must be at least REQUEST_DEADLINE_SECONDS + 60 "
            f"({settings.request_deadline_seconds + 60:g}): a hold must outlive its request."
        )
    if settings.gateway_mode == "live" and settings.openrouter_api_key is None:
        found.append("OPENROUTER_API_KEY is missing: GATEWAY_MODE=live needs it.")
    if bool(settings.supabase_url) != bool(settings.supabase_key):
        missing = "SUPABASE_KEY" if settings.supabase_url else "SUPABASE_URL"
        found.append(
            f"{missing} is missing: a hosted Supabase needs SUPABASE_URL and SUPABASE_KEY (the secret key)."
        )
    if settings.admin_api_key is not None and len(settings.admin_api_key.get_secret_value()) < 16:
        found.append("ADMIN_API_KEY is too short: use at least 16 characters.")
    if settings.vercel and settings.database != "hosted":
        found.append(
            "SUPABASE_URL and SUPABASE_KEY are missing: on Vercel the data lives in a hosted Supabase."
        )
    return found + (_missing_secrets(settings) if settings.database != "embedded" or settings.vercel else [])


def _missing_secrets(settings: Settings) -> list[str]:
    recipe = "make one with: openssl rand -base64 32 | tr '+/' '-_'"
    found = []
    if not settings.key_hash_secrets:
        found.append(f"KEY_HASH_SECRETS is missing: API keys are stored as HMACs under it; {recipe}")
    if not settings.encryption_keys:
        found.append(f"ENCRYPTION_KEYS is missing: secrets at rest are encrypted with it; {recipe}")
    if settings.admin_api_key is None:
        found.append("ADMIN_API_KEY is missing: admin routes need it; choose a long random text.")
    if settings.mode is None:
        found.append(
            "OPENROUTER_API_KEY is missing. Without it completions are answered by the sandbox, and on this database that must be "
            "asked for: set GATEWAY_MODE=sandbox."
        )
    return found
