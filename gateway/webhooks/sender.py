"""Sends one POST to a user's URL, to public addresses only; no redirect is followed and no answer is read."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

import aiohttp
from aiohttp.connector import AddrInfoType
from yarl import URL

from gateway.webhooks.public_addresses import (
    Address,
    CheckedResolver,
    Lookup,
    NotPublic,
    is_public,
    literal,
    look_up,
)

SEND_SECONDS = 10.0
AT_ONCE = 8
GONE = 410  # by the Standard Webhooks specification, the receiver wants no more
TROUBLES: dict[type[Exception], str] = {
    aiohttp.ClientConnectorDNSError: "the host's name cannot be resolved",
    aiohttp.ClientSSLError: "the TLS handshake failed: is the certificate valid?",
    aiohttp.ClientConnectorError: "the connection could not be made",
    aiohttp.InvalidURL: "the URL cannot be used",
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """What became of one attempt: the status of the answer, or why there is none."""

    status: int | None
    error: str | None

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class Sender:
    """POSTs to users' URLs. `look_up` knows the addresses of a name, `may_reach` which of them may be
    connected to.
    """

    def __init__(
        self,
        *,
        look_up: Lookup = look_up,
        may_reach: Callable[[Address], bool] = is_public,
        tls: ssl.SSLContext | None = None,
        seconds: float = SEND_SECONDS,
    ) -> None:
        self._resolver = CheckedResolver(look_up, may_reach)
        connector = aiohttp.TCPConnector(
            resolver=self._resolver,
            socket_factory=self._open_socket,
            use_dns_cache=False,  # a cached address would go unchecked
            force_close=True,  # so would a connection that is kept open
            ssl=tls or True,
            limit=AT_ONCE,
        )
        timeout = aiohttp.ClientTimeout(total=seconds)
        jar = aiohttp.DummyCookieJar()  # one user's receiver must not set a cookie for another's
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=jar, auto_decompress=False
        )

    async def post(self, url: str, payload: bytes, headers: Mapping[str, str]) -> Attempt:
        """Sends once. Follows no redirect and reads no body."""
        target = URL(url)
        try:
            if (address := literal(target.host or "")) is not None:  # no resolver is asked for an address
                self._resolver.check(address)
            async with self._session.post(
                target, data=payload, headers=headers, allow_redirects=False
            ) as response:
                # Leaving without reading closes the connection, however much is still to come.
                return Attempt(response.status, _reason(response.status))
        except TimeoutError:
            return Attempt(None, "no answer in time")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Attempt(None, _trouble(error))

    def _open_socket(self, info: AddrInfoType) -> socket.socket:
        """The last check, of the very address that is connected to."""
        family, kind, protocol, _, target = info
        self._resolver.check(ip_address(str(target[0])))
        return socket.socket(family, kind, protocol)

    async def aclose(self) -> None:
        await self._session.close()


def _reason(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return f"redirects are not followed (status {status})"
    return f"the receiver answered with status {status}"


def _trouble(error: Exception) -> str:
    """The reason as the user is told it: it says nothing of our network."""
    for cause in (error, error.__cause__, getattr(error, "os_error", None)):
        if isinstance(cause, NotPublic):
            return str(cause)
    reasons = (reason for kind, reason in TROUBLES.items() if isinstance(error, kind))
    return next(reasons, "the connection broke")
