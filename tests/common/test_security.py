"""Keys, secrets, and where a request comes from."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from common.errors import BadRequest, InvalidKey
from routes.http.client_address import client_address, client_domain
from security import (
    ALPHABET,
    PREFIXES,
    Credential,
    Keyring,
    Vault,
    address_subject,
    key_environment,
    masked,
    new_key,
    presented_key,
    printable_header,
)

ONE, TWO = (base64.urlsafe_b64encode(bytes([n]) * 32).decode().rstrip("=") for n in (1, 2))
TRUSTED = [ipaddress.ip_network(text) for text in ("10.0.0.0/8", "2001:db8::/32")]
# 43 times the digit zero, and the CRC-32 of what stands before it: worked out once, by hand, so that no
# change of the format goes unseen.
KNOWN = "gw_live_" + "0" * 43


def base62(number: int) -> int | str:
    text = ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        text = ALPHABET[digit] + text
    return text


def headers(*pairs: tuple[str, str]) -> Headers:
    return Headers(raw=[(name.encode(), value.encode("latin-1")) for name, value in pairs])


# The format of a key.


@pytest.mark.parametrize(("environment", "prefix"), PREFIXES.items())
def test_a_new_key_has_its_environments_prefix_and_a_valid_checksum(environment: str, prefix: str) -> None:
    key = new_key(environment)
    assert key.startswith(prefix) and len(key) == len(prefix) + 43 + 6
    assert key_environment(key) == environment
    assert key[-6:] == base62(zlib.crc32(key[:-6].encode()))


def test_new_keys_differ() -> None:
    assert len({new_key("live") for _ in range(100)}) == 100


def test_the_checksum_is_the_crc_32_of_everything_before_it_in_base62() -> None:
    assert key_environment(f"{KNOWN}{base62(zlib.crc32(KNOWN.encode()))}") == "live"


@given(st.data())
def test_one_wrong_character_anywhere_is_noticed(data: st.DataObject) -> None:
    key = new_key("live")
    at = data.draw(st.integers(0, len(key) - 1))
    other = data.draw(st.sampled_from([c for c in ALPHABET + "_-. \n" if c != key[at]]))
    assert key_environment(key[:at] + other + key[at + 1 :]) is None


@pytest.mark.parametrize(
    "change",
    [str.upper, str.lower, lambda k: k[:-1], lambda k: k + "0", lambda k: k + "\n", lambda k: " " + k],
)
def test_what_is_almost_a_key_is_refused(change: Any) -> None:
    assert key_environment(change("gw_live_" + "aB" + new_key("live")[10:])) is None


@pytest.mark.parametrize(
    "text",
    ["", "gw_live_", "sk-or-v1-" + "a" * 64, "gw_prod_" + "0" * 49, "gw_development_" + "0" * 49, "é" * 57],
)
def test_what_is_no_key_has_no_environment(text: str) -> None:
    assert key_environment(text) is None


def test_a_key_of_one_environment_is_not_valid_under_another_prefix() -> None:
    assert key_environment(new_key("test").replace("gw_test_", "gw_live_")) is None


def test_a_masked_key_shows_prefix_and_last_four_only() -> None:
    assert masked("gw_live_", "abcd") == "gw_live_...abcd"


# Secrets.


def test_a_key_is_known_by_its_hmac_under_every_secret_the_current_first() -> None:
    key = new_key("live")
    expected = [hmac.new(bytes([n]) * 32, key.encode(), hashlib.sha256).hexdigest() for n in (2, 1)]
    assert Keyring([TWO, ONE]).hashes(key) == expected


def test_a_secret_has_the_same_id_everywhere_and_the_id_does_not_reveal_it() -> None:
    old, new = Keyring([ONE]), Keyring([TWO, ONE])
    assert new.ids[1] == old.ids[0] != new.ids[0]
    assert old.ids[0] not in (bytes([1]) * 32).hex() and len(old.ids[0]) == 16


def test_a_key_is_stored_without_anything_that_would_open_the_gateway() -> None:
    key = new_key("staging")
    stored = Keyring([ONE]).stored(key, "staging", "mine")
    assert stored == {
        "key_name": "mine",
        "key_prefix": "gw_staging_",
        "last4": key[-4:],
        "key_hash": Keyring([ONE]).hashes(key)[0],
        "hash_secret_id": Keyring([ONE]).ids[0],
        "environment_tag": "staging",
    }
    assert key not in str(stored)


def test_a_pseudonym_is_stable_and_is_not_a_keys_hash() -> None:
    ring = Keyring([ONE])
    assert ring.pseudonym("7") == Keyring([ONE, TWO]).pseudonym("7") != Keyring([TWO]).pseudonym("7")
    assert ring.pseudonym("7") != ring.hashes("7")[0][:32]


def test_what_an_older_key_encrypted_is_still_readable_and_what_a_dropped_one_did_is_not() -> None:
    token = Vault([ONE]).encrypt("secret")
    assert Vault([TWO, ONE]).decrypt(token) == "secret"
    assert Vault([ONE]).decrypt(Vault([TWO, ONE]).encrypt("secret")) is None
    assert Vault([TWO]).decrypt(token) is None


@pytest.mark.parametrize("token", ["", "x", "gAAAAA=="])
def test_what_nobody_encrypted_is_not_readable(token: str) -> None:
    assert Vault([ONE]).decrypt(token) is None


def test_a_tampered_token_is_not_readable() -> None:
    token = Vault([ONE]).encrypt("secret")
    assert Vault([ONE]).decrypt(token[:-10] + ("A" if token[-10] != "A" else "B") + token[-9:]) is None


# The client's address.


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("198.51.100.1", [], "198.51.100.1"),
        ("198.51.100.1", ["192.0.2.1"], "198.51.100.1"),  # a stranger's word
        ("10.0.0.1", ["192.0.2.1"], "192.0.2.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["6.6.6.6, 192.0.2.1"], "192.0.2.1"),  # the client's own invention stands on the left
        ("10.0.0.1", ["6.6.6.6, 192.0.2.1, 10.0.0.2"], "192.0.2.1"),
        ("10.0.0.1", ["6.6.6.6", "192.0.2.1,10.0.0.2"], "192.0.2.1"),  # several headers are one list
        ("10.0.0.1", ["192.0.2.1", "10.0.0.3", "10.0.0.2"], "192.0.2.1"),
        ("10.0.0.1", ["10.0.0.9,10.0.0.8"], "10.0.0.9"),
        ("10.0.0.1", ["2001:db9::1"], "2001:db9::1"),
        ("2001:db8::5", ["192.0.2.1"], "192.0.2.1"),
        ("10.0.0.1", ["[2001:db9::1]"], "2001:db9::1"),
        ("::ffff:10.0.0.1", ["192.0.2.1"], "192.0.2.1"),
        ("10.0.0.1", ["::ffff:192.0.2.1"], "192.0.2.1"),
        ("10.0.0.1", ["192.0.2.1, unknown"], "10.0.0.1"),  # what is behind garbage may be invented
        ("10.0.0.1", ["6.6.6.6, '; drop table users"], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["6.6.6.6,,"], "10.0.0.1"),
        ("10.0.0.1", ["fe80::1%eth0"], "fe80::1"),
        (None, ["192.0.2.1"], "0.0.0.0"),
        ("testclient", ["192.0.2.1"], "0.0.0.0"),
    ],
)
def test_the_clients_address_is_what_trusted_proxies_say(
    peer: str | None, forwarded: list[str], expected: str
) -> None:
    sent = headers(*(("x-forwarded-for", value) for value in forwarded))
    assert client_address(sent, peer, TRUSTED, on_vercel=False) == expected


def test_without_trusted_proxies_nobody_is_believed() -> None:
    sent = headers(
        ("x-forwarded-for", "192.0.2.1"), ("x-real-ip", "192.0.2.1"), ("forwarded", "for=192.0.2.1")
    )
    assert client_address(sent, "127.0.0.1", [], on_vercel=False) == "127.0.0.1"


def test_on_vercel_the_platforms_header_counts_and_elsewhere_it_does_not() -> None:
    sent = headers(("x-vercel-forwarded-for", "192.0.2.1"), ("x-forwarded-for", "6.6.6.6"))
    assert client_address(sent, "10.0.0.1", [], on_vercel=True) == "192.0.2.1"
    assert client_address(sent, "198.51.100.1", TRUSTED, on_vercel=False) == "198.51.100.1"


@given(
    st.lists(
        st.text(max_size=40).filter(lambda t: "," not in t and t.isascii() and t.isprintable()), max_size=5
    )
)
def test_no_header_leads_to_anything_but_an_address(hops: list[str]) -> None:
    address = client_address(
        headers(("x-forwarded-for", ",".join(hops))), "10.0.0.1", TRUSTED, on_vercel=False
    )
    assert str(ipaddress.ip_address(address)) == address


@pytest.mark.parametrize(
    ("address", "subject"),
    [("192.0.2.1", "192.0.2.1"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("::1", "::/64")],
)
def test_registration_counts_an_address_or_a_hosts_whole_network(address: str, subject: str) -> None:
    assert address_subject(address) == subject


# The client's domain.


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([], None),
        ([("origin", "https://good.com")], "good.com"),
        ([("origin", "https://GOOD.com:8443")], "good.com"),
        ([("referer", "https://good.com/path?x=1")], "good.com"),
        ([("origin", "https://evil.com"), ("referer", "https://good.com/")], "evil.com"),
        ([("referer", "https://evil.com/?good.com")], "evil.com"),
        ([("referer", "https://evil.com/#@good.com")], "evil.com"),
        ([("referer", "https://good.com@evil.com/")], "evil.com"),
        ([("origin", "null"), ("referer", "https://good.com/")], None),
        ([("origin", "good.com")], None),
        ([("origin", "https://[good.com")], None),
        ([("origin", "")], None),
    ],
)
def test_the_clients_domain_is_the_host_of_origin_else_of_referer(
    sent: list[tuple[str, str]], expected: str | None
) -> None:
    assert client_domain(headers(*sent)) == expected


# The key that a request presents.


@pytest.mark.parametrize(
    "sent",
    [
        [("authorization", "Bearer KEY")],
        [("authorization", "bearer  KEY ")],
        [("x-api-key", " KEY")],
        [("authorization", "Bearer KEY"), ("x-api-key", "KEY")],
        [("authorization", "Basic dXNlcjpwYXNz"), ("x-api-key", "KEY")],
        [("authorization", "Bearer "), ("x-api-key", "KEY")],
    ],
)
def test_a_key_is_read_from_either_header(sent: list[tuple[str, str]]) -> None:
    assert presented_key(headers(*sent)) == "KEY"


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [("authorization", "Bearer")],
        [("authorization", "KEY")],
        [("authorization", "Basic KEY")],
        [("x-api-key", "")],
    ],
)
def test_a_request_without_a_key_is_told_to_send_one(sent: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidKey):
        presented_key(headers(*sent))


@pytest.mark.parametrize("other", ["KEY2", "key", "KÉY"])
def test_two_different_keys_are_a_bad_request(other: str) -> None:
    with pytest.raises(BadRequest):
        presented_key(headers(("authorization", "Bearer KEY"), ("x-api-key", other)))


def test_header_text_is_stored_short_and_without_control_characters() -> None:
    assert printable_header("a\x00b\x1bc\u2028" + "d" * 20, 6) == "abcddd"
    assert printable_header("", 6) is None
    assert printable_header(None, 6) is None


def test_a_credential_becomes_the_fields_of_an_admission_item() -> None:
    item = Credential(("h",), "s", None, "live", "192.0.2.1", None, "agent").item()
    assert set(item) == {
        "hashes",
        "secret_id",
        "legacy_hash",
        "prefix_environment",
        "address",
        "domain",
        "user_agent",
    }


@pytest.mark.parametrize(
    ("hop", "address"),
    [
        ("203.0.113.7:5678", "203.0.113.7"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
    ],
)
def test_a_forwarded_address_may_carry_a_port(hop: str, address: str) -> None:
    proxies = (ipaddress.ip_network("10.0.0.0/8"),)
    assert client_address(Headers({"x-forwarded-for": hop}), "10.0.0.1", proxies, on_vercel=False) == address
