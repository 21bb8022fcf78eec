"""The guard against server-side request forgery (SSRF): only public addresses of the internet may be reached.

A name may be given another address at any time, so a check when a URL is stored proves nothing. The resolver
of the connection itself checks, and what it has checked is what is connected to. Sources: IANA's registries
of special-purpose addresses (RFC 6890), the OWASP cheat sheet on server-side request forgery.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup = Callable[[str, int], Awaitable[list[str]]]

MAX_URL = 2000
HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Not public: this host, private networks, carriers' networks, links, documentation, benchmarks, multicast and
# reserved addresses; tunnels and translations, which hide another address; and the one address of a cloud's
# own services (Azure's) that looks public.
CLOSED_V4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
            "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
            "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32",
        ),
    )
)  # fmt: skip
CLOSED_V6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))


class NotPublic(OSError):
    """The host has an address that is not public."""


def is_public(address: Address) -> bool:
    """Whether anybody on the internet could reach this address, or the one that it is a translation of."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in CLOSED_V4)
    if address.scope_id is not None:  # an address of one network interface only
        return False
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address in PUBLIC_V6 and not any(address in network for network in CLOSED_V6)


def literal(host: str) -> Address | None:
    """The address that a host of a URL is itself, None for a name."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def problem_of(url: str) -> str | None:
    """Why this URL cannot be a destination, None where it may. Names are looked up when something is sent,
    not here.
    """
    if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return f"takes at most {MAX_URL} printable ASCII characters, without spaces and backslashes"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is not a URL"
    host = parts.hostname or ""
    if parts.scheme != "https" or not HOST.fullmatch(host) or port == 0:
        return "must be an https:// URL"
    if parts.username is not None or parts.password is not None or parts.fragment:
        return "takes no user, password or fragment"
    address = literal(host)
    # A last label of digits is an address in a spelling that only some libraries know (0x7f.1, 127.1).
    if address is None and ("." not in host.strip(".") or host.rstrip(".").rpartition(".")[2].isdigit()):
        return "must name a public host"
    if address is not None and not is_public(address):
        return "must be a public address"
    return None


async def look_up(host: str, port: int) -> list[str]:
    """All addresses of a name, as the system knows them now. Raises OSError."""
    entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


class CheckedResolver(AbstractResolver):
    """Looks names up for a connection. A name is refused if `may_reach` refuses any of its addresses."""

    def __init__(self, look_up: Lookup, may_reach: Callable[[Address], bool]) -> None:
        self._look_up = look_up
        self._may_reach = may_reach

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        addresses = [ipaddress.ip_address(text) for text in await self._look_up(host, port)]
        for address in addresses:
            self.check(address)
        return [self._result(host, port, address) for address in addresses]

    def check(self, address: Address) -> None:
        """Raises NotPublic."""
        if not self._may_reach(address):
            raise NotPublic("the host has an address that is not public")

    def _result(self, host: str, port: int, address: Address) -> ResolveResult:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return ResolveResult(
            hostname=host, host=str(address), port=port, family=family, proto=socket.IPPROTO_TCP, flags=flags
        )

    async def close(self) -> None:
        """There is nothing to close."""
