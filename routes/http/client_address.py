"""Where a request comes from: the client's address, domain and user agent, as far as they can be trusted.

A header that anybody can send is believed only where a trusted proxy or the platform has set it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers

from config import Network
from gateway.runtime.instance import Runtime
from security import printable_header


def user_agent_of(request: Request) -> str | None:
    return printable_header(request.headers.get("user-agent"), 512)


def address_of(request: Request, runtime: Runtime) -> str:
    peer = request.client.host if request.client else None
    settings = runtime.settings
    return client_address(request.headers, peer, settings.trusted_proxies, on_vercel=settings.vercel)


def client_address(headers: Headers, peer: str | None, trusted: Iterable[Network], *, on_vercel: bool) -> str:
    """The client's address: the peer's, or the one that trusted proxies report.

    X-Forwarded-For is read from right to left, as long as the address that reported a hop is a trusted proxy.
    On Vercel the platform itself overwrites `x-vercel-forwarded-for`, and the peer is its own machine.
    """
    if on_vercel:
        peer = headers.get("x-vercel-forwarded-for", "").split(",")[0].strip() or peer
    address = _ip(peer) or ipaddress.IPv4Address(0)
    hops = [hop.strip() for line in headers.getlist("x-forwarded-for") for hop in line.split(",")]
    networks = tuple(trusted)
    while hops and any(address in network for network in networks):
        # What the first untrusted address says of those before it is only its word.
        hop = _ip(hops.pop())
        if hop is None:
            break
        address = hop
    return str(address)


@lru_cache(4096)
def _ip(text: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address. Some proxies write it with a port (`192.0.2.1:443`, `[2001:db8::1]:443`) or a zone."""
    text = text or ""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def client_domain(headers: Headers) -> str | None:
    """The host of Origin, else of Referer, in lower case; None where neither names one."""
    for name in ("origin", "referer"):
        if value := headers.get(name):
            try:
                return urlsplit(value).hostname
            except ValueError:
                return None
    return None
