"""OpenRouter, or the sandbox in its place: sends requests, and looks up models, generations and accounts.

A request must go out once: there are no retries and no redirects. It goes out through the OpenAI SDK's client
as bytes, and comes back as bytes. Errors are raised as GatewayErrors, without the operator's secrets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
import httpx2
import structlog
from openai import APIConnectionError, APIStatusError, AsyncStream, DefaultAioHttpClient

from common.errors import UpstreamError, UpstreamRefused, UpstreamTimeout, UpstreamUnavailable
from common.json_types import JsonObject
from config import Settings
from gateway.upstream.response import JSON, UpstreamResponse
from gateway.upstream.transport import OpenRouterClient, bound_error
from gateway.upstream.usage import parse_json

log = structlog.get_logger("openrouter")
CONNECT_SECONDS = 10.0
LOOKUP_SECONDS = 15.0  # for what is not billed; a billed request has the operator's own limit
# Test keys are free, so what the sandbox does for them is bounded.
TEST_ANSWER_BYTES = 64 * 1024
TEST_SECONDS = 60

# What a broken exchange can raise: httpx's own errors, and those of the aiohttp transport under it.
TRANSPORT_ERRORS = (httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError, OSError)


class Unreachable(UpstreamUnavailable):
    """The model provider cannot be reached. Nothing was sent to it."""

    code = "upstream_unreachable"


class Upstream:
    """OpenRouter, or the sandbox in its place."""

    def __init__(self, client: OpenRouterClient, *, suffixes: frozenset[str] = frozenset()) -> None:
        self._client = client
        self.suffixes = suffixes

    @property
    def is_sandbox(self) -> bool:
        """Whether this is the sandbox: only it has scenarios, which model ids name as suffixes."""
        return bool(self.suffixes)

    async def send(
        self, path: str, body: bytes, headers: Mapping[str, str], *, api_key: str | None = None
    ) -> UpstreamResponse:
        """Sends one billable request, exactly once. Raises UpstreamTimeout or UpstreamError where nothing is
        answered at all.

        A response with an error status is a response. `api_key`: the user's own account, in place of the
        operator's.
        """
        # An encoded body would have to be decoded before its events can be read and passed on.
        headers = {"Content-Type": JSON, "Accept-Encoding": "identity", **headers}
        try:
            response = await self._client.transmit(path, body, headers, api_key=api_key)
        except TRANSPORT_ERRORS as error:
            raise _no_response(error) from error
        return UpstreamResponse(response.status_code, response.headers, response)

    async def fetch_models(self) -> bytes:
        """The body of GET /models, all output modalities. Raises UpstreamUnavailable."""
        return await self._get("/models", {"output_modalities": "all"})

    async def find_generation(self, generation_id: str, *, api_key: str | None = None) -> JsonObject | None:
        """The upstream's record of a generation, None while it has none (yet). Raises UpstreamUnavailable.

        `api_key`: the account that it was made under, where that is not the operator's. A key that has been
        refused since then knows of nothing.
        """
        try:
            raw = await self._get("/generation", {"id": generation_id}, api_key)
        except UpstreamRefused as refusal:
            if refusal.status == 404 or (api_key is not None and refusal.status in (401, 403)):
                return None
            raise UpstreamUnavailable() from refusal
        return _data_of(raw)

    async def find_endpoints(self, model_id: str) -> bytes | None:
        """The body of GET /models/{id}/endpoints, None for a model that the upstream does not know. Raises
        UpstreamUnavailable.
        """
        try:
            return await self._get(f"/models/{quote(model_id, safe='/:')}/endpoints", {})
        except UpstreamRefused as refusal:
            if refusal.status == 404:
                return None
            raise UpstreamUnavailable() from refusal

    async def read_account(self, *, api_key: str | None = None) -> JsonObject | None:
        """The `data` of GET /key, of the operator's key or of `api_key`; None for a key that is refused.
        Raises UpstreamUnavailable.
        """
        try:
            raw = await self._get("/key", {}, api_key)
        except UpstreamRefused as refusal:
            if refusal.status in (401, 403):
                return None
            raise UpstreamUnavailable() from refusal
        data = _data_of(raw)
        if data is None:
            raise UpstreamUnavailable()
        return data

    async def _get(self, path: str, query: Mapping[str, str], api_key: str | None = None) -> bytes:
        """The body of a lookup. Raises UpstreamRefused for an error status, else UpstreamUnavailable."""
        authorization = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        options: Any = {
            "params": dict(query),
            "timeout": httpx2.Timeout(LOOKUP_SECONDS),
            "headers": {"Accept-Encoding": "identity", **authorization},
        }
        raw: Any
        try:
            raw = await self._client.get(
                path, cast_to=httpx2.Response, options=options, stream=True, stream_cls=AsyncStream[Any]
            )
        except APIStatusError as error:
            raise UpstreamRefused(status=error.status_code) from error
        except (APIConnectionError, *TRANSPORT_ERRORS) as error:
            raise UpstreamUnavailable() from error
        response = UpstreamResponse(raw.status_code, raw.headers, raw)
        try:
            return await response.read()
        except UpstreamError as error:
            raise UpstreamUnavailable() from error
        finally:
            await response.aclose()

    async def aclose(self) -> None:
        await self._client.close()


def _data_of(raw: bytes) -> JsonObject | None:
    """The `data` object of a body, None without one. Raises UpstreamUnavailable for what is no JSON."""
    try:
        body = parse_json(raw)
    except ValueError as error:
        raise UpstreamUnavailable() from error
    data = body.get("data") if isinstance(body, dict) else None
    return data if isinstance(data, dict) else None


def _no_response(error: Exception) -> UpstreamError:
    """The error of a request that nothing was answered to. Whether it arrived is unknown, unless the
    connection itself could not be made.
    """
    # The aiohttp transport calls both a refused and a broken connection ConnectTimeout; the cause of that
    # error says which it was.
    cause = error.__cause__
    never_connected = isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
    if isinstance(error, httpx2.ConnectError) or never_connected:
        return Unreachable()
    if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
        return UpstreamTimeout()
    return UpstreamError("The model provider closed the connection without an answer.")


def open_live(settings: Settings) -> Upstream:
    """OpenRouter under the operator's key. Needs OPENROUTER_API_KEY."""
    key = settings.openrouter_api_key.get_secret_value() if settings.openrouter_api_key else ""
    timeout = httpx2.Timeout(settings.upstream_timeout_seconds, connect=CONNECT_SECONDS)
    http = DefaultAioHttpClient(
        follow_redirects=False, timeout=timeout, event_hooks={"response": [bound_error]}
    )
    site = {"HTTP-Referer": settings.openrouter_site_url, "X-Title": settings.openrouter_site_name}
    return Upstream(
        OpenRouterClient(
            api_key=key,
            base_url=settings.openrouter_base_url,
            max_retries=0,
            timeout=timeout,
            http_client=http,
            default_headers={name: value for name, value in site.items() if value},
        )
    )


def open_sandbox(*, for_test_keys: bool) -> Upstream:
    """The built-in simulator, in process; for test keys its answers are bounded."""
    from sandbox import SCENARIOS, SandboxTransport, create_app  # most live instances never need it

    if for_test_keys:
        app = create_app(max_answer_bytes=TEST_ANSWER_BYTES, max_seconds=TEST_SECONDS)
    else:
        app = create_app()
    http = httpx2.AsyncClient(transport=SandboxTransport(app), follow_redirects=False)
    client = OpenRouterClient(
        api_key="sandbox",
        base_url="http://sandbox.invalid/api/v1",
        max_retries=0,
        timeout=300,
        http_client=http,
    )
    return Upstream(client, suffixes=frozenset(SCENARIOS))
