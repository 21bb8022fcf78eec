"""A receiver of webhooks: a TLS server on loopback, whose certificate the senders of tests trust.

Which addresses may be reached is decided by an argument of the sender, so that nothing in production can be
told to reach loopback.
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import hmac
import ipaddress
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway.webhooks.sender import Sender

HOST = "hooks.example.com"


@dataclass
class Receiver:
    """Answers each request with the next of `answers` (the last one again and again), and keeps what came."""

    port: int = 0
    answers: list[bytes] = field(
        default_factory=lambda: [b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n"]
    )
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    silent: bool = False
    endless: bool = False
    open_connections: int = 0
    most_connections: int = 0

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}/budgets"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_connections += 1
        self.most_connections = max(self.most_connections, self.open_connections)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = [line.split(": ", 1) for line in head.split("\r\n")[1:] if line]
            headers = {name.lower(): value for name, value in lines}
            self.got.append((headers, await reader.readexactly(int(headers["content-length"]))))
            if self.silent:
                await reader.read()
                return
            writer.write(self.answers[min(len(self.got), len(self.answers)) - 1])
            while self.endless:
                writer.write(b"x" * 65536)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open_connections -= 1
            writer.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for the receiver's name, signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "receiver.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
async def receiver(certificate: Path) -> AsyncIterator[Receiver]:
    receiving = Receiver()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = await asyncio.start_server(receiving.serve, "127.0.0.1", 0, ssl=context)
    receiving.port = server.sockets[0].getsockname()[1]
    yield receiving
    server.close()


@dataclass
class Names:
    """A name server of the test's own: the addresses of any name, by the number of the question."""

    answers: list[list[str]] = field(default_factory=lambda: [["127.0.0.1"]])
    asked: int = 0

    async def look_up(self, _host: str, _port: int) -> list[str]:
        self.asked += 1
        return self.answers[min(self.asked, len(self.answers)) - 1]


def is_loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_loopback


@pytest.fixture
def names() -> Names:
    return Names()


@pytest.fixture
def trusting(certificate: Path, names: Names) -> Callable[..., Sender]:
    """Senders that know the receiver's certificate; which addresses they may reach is up to the test."""

    def make(**changes: Any) -> Sender:
        context = ssl.create_default_context(cafile=certificate)
        return Sender(
            **{"look_up": names.look_up, "may_reach": is_loopback, "tls": context, "seconds": 5.0, **changes}
        )

    return make


def verified(secret: str, headers: dict[str, str], body: bytes) -> bool:
    """As the specification's own libraries verify: any of the signatures may be the one."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    return any(part == f"v1,{expected}" for part in headers["webhook-signature"].split(" "))
