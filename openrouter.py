"""How is the upstream reached, and what do its failures mean to our clients?

The only importer of `openai`. Requests go out through the SDK's client as bytes, once: no retries, no redirects. Answers come back as
bytes. Errors are mapped to GatewayErrors without the operator's secrets.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import httpx2
import structlog
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, AsyncStream, DefaultAioHttpClient
from openai._models import FinalRequestOptions

from config import Settings
from errors import UpstreamError, UpstreamRefused, UpstreamTimeout, UpstreamUnavailable
from upstream_errors import TIMEOUT_STATUSES
from usage import parse_json

log = structlog.get_logger("openrouter")

CONNECT_SECONDS = 10.0
LOOKUP_SECONDS = 15.0
MAX_ERROR_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 64 * 1024 * 1024
BROKEN = "The connection to the model provider broke in mid-answer."
MAX_BUILT = 64
JSON = "application/json"
TEST_ANSWER_BYTES = 64 * 1024
TEST_SECONDS = 60

# Providers that stop generating, and billing, when the connection is closed (OpenRouter's documentation, "Stream cancellation").
STOPS_ON_ABORT = frozenset(
    [
        "openai",
        "azure",
        "anthropic",
        "fireworks",
        "mancer",
        "recursal",
        "anyscale",
        "lepton",
        "octoai",
        "novita",
        "deepinfra",
        "together",
        "cohere",
        "hyperbolic",
        "infermatic",
        "avian",
        "xai",
        "cloudflare",
        "sfcompute",
        "nineteen",
        "liquid",
        "friendli",
        "chutes",
        "deepseek",
    ]
)


def stops_on_abort(provider: str | None) -> bool:
    """Whether closing the connection ends the bill at this provider (given by the name in its answers)."""
    return provider is not None and re.sub(r"[^a-z0-9]", "", provider.lower()) in STOPS_ON_ABORT


class Unreachable(UpstreamUnavailable):
    """The model provider cannot be reached. Nothing was sent to it."""

    code = "upstream_unreachable"


@dataclass(slots=True)
class Answer:
    """An upstream's answer whose body has not been read yet; must be closed."""

    status: int
    headers: httpx2.Headers
    _response: httpx2.Response

    @property
    def generation_id(self) -> str | None:
        value = self.headers.get("x-generation-id")
        return value if value and len(value) <= 256 and value.isascii() and value.isprintable() else None

    @property
    def is_refusal(self) -> bool:
        """Whether nothing was generated: what timed out may be running, and billed, behind its answer."""
        return 400 <= self.status < 600 and self.status not in TIMEOUT_STATUSES

    @property
    def is_json(self) -> bool:
        return self.headers.get("content-type", "").lower().startswith(JSON)

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").lower().startswith("text/event-stream")

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives, decoded where it was encoded. Raises UpstreamTimeout or UpstreamError when it breaks off."""
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        stream = self._response.stream
        plain = encoding in ("", "identity") and isinstance(stream, httpx2.AsyncByteStream)
        try:
            async for piece in stream if plain else self._response.aiter_bytes():  # type: ignore[union-attr]
                if piece:
                    yield piece
        except httpx2.TimeoutException as error:
            if isinstance(error, httpx2.ConnectTimeout):  # what the aiohttp transport makes of a connection that broke
                raise UpstreamError(BROKEN) from error
            raise UpstreamTimeout("The model provider fell silent in mid-answer.") from error
        except (httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError, OSError) as error:
            raise UpstreamError(BROKEN) from error

    async def read(self) -> bytes:
        """The whole body, decoded; of an error as much as its message needs. Raises UpstreamError beyond MAX_ANSWER_BYTES."""
        body = bytearray()
        async for piece in self.chunks():
            body += piece
            if self.status >= 400 and len(body) >= MAX_ERROR_BYTES:
                break
            if len(body) > MAX_ANSWER_BYTES:
                raise UpstreamError("The model provider's answer is too large.")
        return bytes(body[:MAX_ERROR_BYTES] if self.status >= 400 else body)

    async def aclose(self) -> None:
        await self._response.aclose()


class _Repeated(httpx2.Request):
    """The first request of its kind with another body; its content-length is the transport's to say."""

    def __init__(self, first: httpx2.Request, body: bytes, api_key: str | None) -> None:
        self.method, self.url, self.headers, self.extensions = first.method, first.url, first.headers, first.extensions
        if api_key is not None:
            self.headers = first.headers.copy()  # the others keep the operator's
            self.headers["Authorization"] = f"Bearer {api_key}"  # in its place, whatever its case
        self.stream = httpx2.ByteStream(body)
        self.read()


class OpenRouterClient(AsyncOpenAI):
    """The SDK's client with a shorter way for requests whose body is bytes, which are sent once and whose answers nobody parses.

    Of the requests to one path with the same headers the SDK builds the first, with all that it adds; the others are that one with another
    body. They go out through the SDK's own transport. (docs/decisions/0006)
    """

    _built: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[httpx2.Request, httpx2.AsyncBaseTransport]]

    async def transmit(self, path: str, body: bytes, headers: Mapping[str, str], *, api_key: str | None = None) -> httpx2.Response:
        """POSTs the body, whose Content-Type the headers name, and returns whatever is answered, unread. Raises httpx2's errors.

        `api_key`: an account's that is not the operator's.
        """
        known = self.__dict__.setdefault("_built", {})
        key = (path, tuple(headers.items()))
        if key not in known:
            if len(known) >= MAX_BUILT:
                known.clear()
            as_json = {**headers, "Content-Type": JSON}  # a form it would build itself, out of fields
            built = self._build_request(FinalRequestOptions.construct(method="post", url=path, content=b"{}", headers=as_json))
            built.headers.pop("content-length", None)
            built.headers["Content-Type"] = headers["Content-Type"]
            known[key] = built, self._client._transport_for_url(built.url)
        first, transport = known[key]
        answer: httpx2.Response = await transport.handle_async_request(_Repeated(first, body, api_key))
        return answer


class Upstream:
    """OpenRouter, or the sandbox in its place."""

    def __init__(self, client: OpenRouterClient, *, suffixes: frozenset[str] = frozenset()) -> None:
        self._client = client
        self.suffixes = suffixes

    async def send(self, path: str, body: bytes, headers: Mapping[str, str], *, api_key: str | None = None) -> Answer:
        """Sends one billable request, exactly once. Raises UpstreamTimeout or UpstreamError where there is no answer at all.

        An answer with an error status is an answer. `api_key`: the user's own account, instead of the operator's.
        """
        sent = {"Content-Type": JSON, "Accept-Encoding": "identity", **headers}
        try:
            response = await self._client.transmit(path, body, sent, api_key=api_key)
        except (httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError, OSError) as error:
            raise _no_answer(error) from error
        return Answer(response.status_code, response.headers, response)

    async def fetch_models(self) -> bytes:
        """The body of GET /models, all output modalities. Raises UpstreamUnavailable."""
        return await self._get("/models", {"output_modalities": "all"})

    async def find_generation(self, generation_id: str, *, api_key: str | None = None) -> Mapping[str, Any] | None:
        """What the upstream says of a generation, None while it knows nothing (yet). Raises UpstreamUnavailable.

        `api_key`: the account that it was made under, where that is not the operator's; one that is refused by now knows nothing.
        """
        try:
            raw = await self._get("/generation", {"id": generation_id}, api_key)
        except UpstreamRefused as refusal:
            if refusal.status == 404 or (api_key is not None and refusal.status in (401, 403)):
                return None
            raise UpstreamUnavailable() from refusal
        return _data_of(raw)

    async def find_endpoints(self, model_id: str) -> bytes | None:
        """The body of GET /models/{id}/endpoints, None for a model that the upstream does not know. Raises UpstreamUnavailable."""
        try:
            return await self._get(f"/models/{quote(model_id, safe='/:')}/endpoints", {})
        except UpstreamRefused as refusal:
            if refusal.status == 404:
                return None
            raise UpstreamUnavailable() from refusal

    async def read_account(self, *, api_key: str | None = None) -> Mapping[str, Any] | None:
        """The `data` of GET /key, of the operator's key or of `api_key`; None for a key that is refused. Raises UpstreamUnavailable."""
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
        headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {api_key}"} if api_key is not None else {})}
        options: Any = {"params": dict(query), "timeout": httpx2.Timeout(LOOKUP_SECONDS), "headers": headers}
        response: Any
        try:
            response = await self._client.get(path, cast_to=httpx2.Response, options=options, stream=True, stream_cls=AsyncStream[Any])
        except APIStatusError as error:
            raise UpstreamRefused(status=error.status_code) from error
        except (APIConnectionError, httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError, OSError) as error:
            raise UpstreamUnavailable() from error
        answer = Answer(response.status_code, response.headers, response)
        try:
            return await answer.read()
        except UpstreamError as error:
            raise UpstreamUnavailable() from error
        finally:
            await answer.aclose()

    async def aclose(self) -> None:
        await self._client.close()


def _data_of(raw: bytes) -> Mapping[str, Any] | None:
    """The `data` object of an answer, None without one. Raises UpstreamUnavailable for what is no JSON."""
    try:
        answer = parse_json(raw)
    except ValueError as error:
        raise UpstreamUnavailable() from error
    data = answer.get("data") if isinstance(answer, dict) else None
    return data if isinstance(data, dict) else None


def _no_answer(error: Exception) -> UpstreamError:
    """Raised before an answer began; whether the request arrived is unknown unless the connection itself could not be made."""
    # The aiohttp transport calls both a refused and a broken connection ConnectTimeout; what it was is the cause of that.
    root = error.__cause__
    if isinstance(error, httpx2.ConnectError) or isinstance(root, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Unreachable()
    if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
        return UpstreamTimeout()
    return UpstreamError("The model provider closed the connection without an answer.")


async def _bound_error(response: httpx2.Response) -> None:
    """The SDK reads error answers whole, whatever their size: they end early here."""
    if not response.is_success and isinstance(response.stream, httpx2.AsyncByteStream):
        response.stream = _Bounded(response.stream)


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = MAX_ERROR_BYTES
        async for chunk in self._stream:
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                return

    async def aclose(self) -> None:
        await self._stream.aclose()


def open_live(settings: Settings) -> Upstream:
    """OpenRouter under the operator's key. Needs OPENROUTER_API_KEY."""
    key = settings.openrouter_api_key.get_secret_value() if settings.openrouter_api_key else ""
    timeout = httpx2.Timeout(settings.upstream_timeout_seconds, connect=CONNECT_SECONDS)
    http = DefaultAioHttpClient(follow_redirects=False, timeout=timeout, event_hooks={"response": [_bound_error]})
    named = {"HTTP-Referer": settings.openrouter_site_url, "X-Title": settings.openrouter_site_name}
    return Upstream(
        OpenRouterClient(
            api_key=key,
            base_url=settings.openrouter_base_url,
            max_retries=0,
            timeout=timeout,
            http_client=http,
            default_headers={name: value for name, value in named.items() if value},
        )
    )


def open_sandbox(*, for_test_keys: bool) -> Upstream:
    """The built-in simulator, in process; for test keys with bounded answers."""
    from sandbox import SCENARIOS, SandboxTransport, create_app  # most live instances never need it

    app = create_app(max_answer_bytes=TEST_ANSWER_BYTES, max_seconds=TEST_SECONDS) if for_test_keys else create_app()
    http = httpx2.AsyncClient(transport=SandboxTransport(app), follow_redirects=False)
    client = OpenRouterClient(api_key="sandbox", base_url="http://sandbox.invalid/api/v1", max_retries=0, timeout=300, http_client=http)
    return Upstream(client, suffixes=frozenset(SCENARIOS))
