"""Where a request comes from: trusted proxies, the platform's header. The client's address and domain, as far
as what says so can be trusted.
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


def address_of(request: Request, runtime: Runtime) -> str:
    peer = request.client.host if request.client else None
    settings = runtime.settings
    return client_address(request.headers, peer, settings.trusted_proxies, on_vercel=settings.vercel)


def client_address(headers: Headers, peer: str | None, trusted: Iterable[Network], *, on_vercel: bool) -> str:
    """The client's address: the peer's, or what trusted proxies say of it.

    X-Forwarded-For is read from right to left for as long as the address that said so is a trusted proxy. On
    Vercel the platform overwrites `x-vercel-forwarded-for` itself, and its own peers mean nothing.
    """
    if on_vercel:
        peer = headers.get("x-vercel-forwarded-for", "").split(",")[0].strip() or peer
    address = _ip(peer) or ipaddress.IPv4Address(0)
    hops = [hop.strip() for line in headers.getlist("x-forwarded-for") for hop in line.split(",")]
    networks = tuple(trusted)
    while hops and any(address in network for network in networks):
        hop = _ip(hops.pop())
        if hop is None:
            break
        address = hop
    return str(address)


@lru_cache(4096)
def _ip(text: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address, which some proxies write with a port (`192.0.2.1:443`, `[2001:db8::1]:443`) or a zone."""
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
