"""The OpenAI SDK's client, and its short path for bodies that are bytes.

Only gateway/upstream may import openai.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import httpx2
from openai import AsyncOpenAI
from openai._models import FinalRequestOptions

from gateway.upstream.response import JSON, MAX_ERROR_BYTES

MAX_BUILT = 64  # requests that are built once, by path and headers


class _Repeated(httpx2.Request):
    """The first request of its kind with another body. The transport sets its content-length."""

    def __init__(self, first: httpx2.Request, body: bytes, api_key: str | None) -> None:
        self.method, self.url, self.extensions = first.method, first.url, first.extensions
        self.headers = first.headers
        if api_key is not None:
            self.headers = first.headers.copy()  # the other requests keep the operator's key
            self.headers["Authorization"] = f"Bearer {api_key}"  # in its place, whatever its case
        self.stream = httpx2.ByteStream(body)
        self.read()


class OpenRouterClient(AsyncOpenAI):
    """The SDK's client with a shorter way for requests whose body is bytes, which are sent once and whose
    responses are not parsed.

    The SDK builds the first request to a path with certain headers, with all that it adds; the others are
    that one with another body. All go out through the SDK's own transport (docs/decisions/0006).
    """

    _built: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[httpx2.Request, httpx2.AsyncBaseTransport]]

    async def transmit(
        self, path: str, body: bytes, headers: Mapping[str, str], *, api_key: str | None = None
    ) -> httpx2.Response:
        """POSTs the body, whose Content-Type the headers name, and returns the response, unread. Raises
        httpx2's errors.

        `api_key`: that of another account than the operator's.
        """
        built = self.__dict__.setdefault("_built", {})
        key = (path, tuple(headers.items()))
        if key not in built:
            if len(built) >= MAX_BUILT:
                built.clear()
            built[key] = self._build_first(path, headers)
        first, transport = built[key]
        response: httpx2.Response = await transport.handle_async_request(_Repeated(first, body, api_key))
        return response

    def _build_first(
        self, path: str, headers: Mapping[str, str]
    ) -> tuple[httpx2.Request, httpx2.AsyncBaseTransport]:
        as_json = {**headers, "Content-Type": JSON}  # the SDK would build a form itself, out of fields
        request = self._build_request(
            FinalRequestOptions.construct(method="post", url=path, content=b"{}", headers=as_json)
        )
        request.headers.pop("content-length", None)
        request.headers["Content-Type"] = headers["Content-Type"]
        return request, self._client._transport_for_url(request.url)


async def bound_error(response: httpx2.Response) -> None:
    """A response hook: ends error bodies early, since the SDK reads them whole, whatever their size."""
    if not response.is_success and isinstance(response.stream, httpx2.AsyncByteStream):
        response.stream = _Bounded(response.stream)


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        remaining = MAX_ERROR_BYTES
        async for chunk in self._stream:
            yield chunk[:remaining]
            remaining -= len(chunk)
            if remaining <= 0:
                return

    async def aclose(self) -> None:
        await self._stream.aclose()
