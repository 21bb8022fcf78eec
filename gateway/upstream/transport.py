"""The OpenAI SDK's client and its short path for bytes (only gateway/upstream imports openai)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import httpx2
from openai import AsyncOpenAI
from openai._models import FinalRequestOptions

from gateway.upstream.response import JSON, MAX_ERROR_BYTES

MAX_BUILT = 64


class _Repeated(httpx2.Request):
    """The first request of its kind with another body; its content-length is the transport's to say."""

    def __init__(self, first: httpx2.Request, body: bytes, api_key: str | None) -> None:
        self.method, self.url, self.headers, self.extensions = (
            first.method,
            first.url,
            first.headers,
            first.extensions,
        )
        if api_key is not None:
            self.headers = first.headers.copy()  # the others keep the operator's
            self.headers["Authorization"] = f"Bearer {api_key}"  # in its place, whatever its case
        self.stream = httpx2.ByteStream(body)
        self.read()


class OpenRouterClient(AsyncOpenAI):
    """The SDK's client with a shorter way for requests whose body is bytes, which are sent once and whose
    answers nobody parses.

    Of the requests to one path with the same headers the SDK builds the first, with all that it adds; the
    others are that one with another body. They go out through the SDK's own transport. (docs/decisions/0006)
    """

    _built: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[httpx2.Request, httpx2.AsyncBaseTransport]]

    async def transmit(
        self, path: str, body: bytes, headers: Mapping[str, str], *, api_key: str | None = None
    ) -> httpx2.Response:
        """POSTs the body, whose Content-Type the headers name, and returns whatever is answered, unread.
        Raises httpx2's errors.

        `api_key`: an account's that is not the operator's.
        """
        known = self.__dict__.setdefault("_built", {})
        key = (path, tuple(headers.items()))
        if key not in known:
            if len(known) >= MAX_BUILT:
                known.clear()
            as_json = {**headers, "Content-Type": JSON}  # a form it would build itself, out of fields
            built = self._build_request(
                FinalRequestOptions.construct(method="post", url=path, content=b"{}", headers=as_json)
            )
            built.headers.pop("content-length", None)
            built.headers["Content-Type"] = headers["Content-Type"]
            known[key] = built, self._client._transport_for_url(built.url)
        first, transport = known[key]
        answer: httpx2.Response = await transport.handle_async_request(_Repeated(first, body, api_key))
        return answer


async def bound_error(response: httpx2.Response) -> None:
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
