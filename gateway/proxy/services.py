"""What a proxied request uses of the running instance, and no more."""

from __future__ import annotations

from dataclasses import dataclass

from config import Settings
from db_rows.shared import Mode
from gateway.billing.admission import Admission
from gateway.billing.settlement import Settlements
from gateway.pricing.catalog import Catalog
from gateway.runtime.instance import Runtime
from gateway.upstream.client import Upstream
from security import Keyring, Vault


@dataclass(frozen=True, slots=True)
class Services:
    """The parts that serve keys of one environment; `catalog` lists the models of `upstream`."""

    mode: Mode
    settings: Settings
    admission: Admission
    settlements: Settlements
    catalog: Catalog
    upstream: Upstream
    vault: Vault
    keyring: Keyring
    keep_alive_seconds: float

    @property
    def mode_headers(self) -> dict[str, str]:
        """Every invented answer says that it is one."""
        return {"x-gateway-mode": "sandbox"} if self.upstream.is_sandbox else {}

    @classmethod
    def for_environment(cls, runtime: Runtime, environment: str | None) -> Services:
        """Those of a key's environment: test keys have the sandbox in every mode."""
        return cls(
            mode=runtime.mode,
            settings=runtime.settings,
            admission=runtime.admission,
            settlements=runtime.settlements,
            catalog=runtime.catalog(environment),
            upstream=runtime.upstream(environment),
            vault=runtime.vault,
            keyring=runtime.keyring,
            keep_alive_seconds=runtime.keep_alive_seconds,
        )
