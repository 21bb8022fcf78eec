"""Which upstream serves whom: test keys have the sandbox in every mode, and in sandbox mode everybody has it.

Upstreams, model lists and provider lists are opened when they are first asked for: most live instances never
need the sandbox.
"""

from __future__ import annotations

from config import Settings
from db_rows.shared import Mode
from gateway.pricing.catalog import Catalog
from gateway.upstream.client import Upstream, open_live, open_sandbox
from gateway.upstream.provider_endpoints import ProviderEndpoints


def _kind(mode: Mode, environment: str | None) -> str:
    return "test" if environment == "test" else mode


class Upstreams:
    """The upstreams of one instance, each with the lists of its models and of their providers."""

    def __init__(self, settings: Settings, mode: Mode) -> None:
        self._settings = settings
        self._mode = mode
        self._upstreams: dict[str, Upstream] = {}
        self._catalogs: dict[str, Catalog] = {}
        self._provider_endpoints: dict[str, ProviderEndpoints] = {}

    def upstream(self, environment: str | None) -> Upstream:
        """The upstream for keys of this environment."""
        return self._open(_kind(self._mode, environment))

    def upstream_of_record(self, mode: Mode, environment: str | None) -> Upstream | None:
        """The upstream that served a record; None for a live one without OPENROUTER_API_KEY."""
        kind = _kind(mode, environment)
        if kind == "live" and self._settings.openrouter_api_key is None:
            return None
        return self._open(kind)

    def catalog(self, environment: str | None) -> Catalog:
        """The model list of that upstream."""
        kind = _kind(self._mode, environment)
        if kind not in self._catalogs:
            fetch, ttl = self._open(kind).fetch_models, self._settings.model_cache_ttl_seconds
            self._catalogs[kind] = Catalog(fetch, ttl_seconds=ttl)
        return self._catalogs[kind]

    def provider_endpoints(self, environment: str | None) -> ProviderEndpoints:
        """The lists of the providers that serve that upstream's models."""
        kind = _kind(self._mode, environment)
        if kind not in self._provider_endpoints:
            fetch, ttl = self._open(kind).find_endpoints, self._settings.model_cache_ttl_seconds
            self._provider_endpoints[kind] = ProviderEndpoints(fetch, ttl_seconds=ttl)
        return self._provider_endpoints[kind]

    async def aclose(self) -> None:
        """Stops what is being fetched, then closes the connections."""
        for catalog in self._catalogs.values():
            await catalog.aclose()
        for endpoints in self._provider_endpoints.values():
            await endpoints.aclose()
        for upstream in self._upstreams.values():
            await upstream.aclose()

    def _open(self, kind: str) -> Upstream:
        if kind not in self._upstreams:
            is_live = kind == "live"
            self._upstreams[kind] = (
                open_live(self._settings) if is_live else open_sandbox(for_test_keys=kind == "test")
            )
        return self._upstreams[kind]
