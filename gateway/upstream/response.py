"""The upstream's response as it arrives: status, headers and a body that nobody has read yet."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import aiohttp
import httpx2

from common.errors import UpstreamError, UpstreamTimeout
from gateway.upstream.errors import TIMEOUT_STATUSES

MAX_ERROR_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 64 * 1024 * 1024
BROKEN = "The connection to the model provider broke in mid-answer."
JSON = "application/json"


@dataclass(slots=True)
class UpstreamResponse:
    """A response whose body has not been read yet. It must be closed."""

    status: int
    headers: httpx2.Headers
    _response: httpx2.Response

    @property
    def generation_id(self) -> str | None:
        """The id in the response's headers, None where it is missing or could not be stored."""
        value = self.headers.get("x-generation-id")
        return value if value and len(value) <= 256 and value.isascii() and value.isprintable() else None

    @property
    def is_refusal(self) -> bool:
        """Whether nothing was generated. What timed out may still be running, and be billed."""
        return 400 <= self.status < 600 and self.status not in TIMEOUT_STATUSES

    @property
    def is_json(self) -> bool:
        return self.headers.get("content-type", "").lower().startswith(JSON)

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").lower().startswith("text/event-stream")

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives, decoded where it is encoded. Raises UpstreamTimeout or UpstreamError when
        it breaks off.
        """
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        stream = self._response.stream
        # A plain body goes around httpx, whose decoder would cost every event of a stream a layer more.
        plain = encoding in ("", "identity") and isinstance(stream, httpx2.AsyncByteStream)
        try:
            async for piece in stream if plain else self._response.aiter_bytes():  # type: ignore[union-attr]
                if piece:
                    yield piece
        except httpx2.TimeoutException as error:
            if isinstance(
                error, httpx2.ConnectTimeout
            ):  # the aiohttp transport's name for a broken connection
                raise UpstreamError(BROKEN) from error
            raise UpstreamTimeout("The model provider fell silent in mid-answer.") from error
        except (httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError, OSError) as error:
            raise UpstreamError(BROKEN) from error

    async def read(self) -> bytes:
        """The whole body, decoded; of an error, as much as its message needs. Raises UpstreamError for a body
        above MAX_ANSWER_BYTES.
        """
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
