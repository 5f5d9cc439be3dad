"""Client addresses: through trusted proxies, and what they count as. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

from llmkit.settings.gateway import GATEWAY_OPTIONS

__all__ = ["FORWARDING", "LOOPBACK", "MAX_HOPS", "OURSELVES", "Proxies", "is_loopback", "place"]

OURSELVES = "local"
MAX_HOPS, MAX_HEADER = 32, 4096
LOOPBACK = ("127.0.0.0/8", "::1/128")
FORWARDING = ("X-Forwarded-For", "Forwarded", "X-Real-IP")  # headers of proxies, the first counts
Address = IPv4Address | IPv6Address


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return _plain(host.strip("[]")).is_loopback
    except ValueError:
        return False


@lru_cache(4096)
def place(address: str) -> str:
    """What an address counts as: this machine, an IPv4 address, or an IPv6 host's /64.

    Every IPv6 host has 2**64 addresses of its own, so it is counted by its network.

    >>> place("2001:db8::1:2:3:4")
    '2001:db8::/64'
    """
    try:
        ip = _plain(address)
    except ValueError:
        return OURSELVES  # a Unix socket
    if ip.is_loopback:
        return OURSELVES
    if isinstance(ip, IPv4Address):
        return str(ip)
    return str(ipaddress.ip_network((ip, 64), strict=False))


@lru_cache(4096)
def _plain(text: str) -> Address:
    """An address without its zone; an IPv4 one in IPv6's form as IPv4. Raises `ValueError`."""
    ip = ipaddress.ip_address(text.partition("%")[0])
    return (ip.ipv4_mapped or ip) if isinstance(ip, IPv6Address) else ip


class Proxies:
    """The proxies whose headers are believed, as addresses or networks.

    Of ``X-Forwarded-For``, ``Forwarded`` and ``X-Real-IP`` the first that is there counts, read
    from its end: each proxy appends whom it heard, so the last address that is not a proxy's is the
    client's, and what stands before it may be invented. No more than ``hops`` of them are
    believed. ``on_stranger`` is told the address of anybody else who sends such headers. Raises
    `InvalidRequestError`.
    """

    def __init__(
        self,
        trusted: Sequence[str] = (),
        hops: int = MAX_HOPS,
        on_stranger: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._hops, self._on_stranger = hops, on_stranger
        self.replace(trusted)

    def replace(self, trusted: Sequence[str]) -> None:
        """Believe these from now on. Raises `InvalidRequestError`."""
        GATEWAY_OPTIONS["trusted_proxies"].check(tuple(trusted))
        self._networks = [ipaddress.ip_network(text.strip()) for text in trusted]

    def trusts(self, address: str) -> bool:
        """Whether this is a proxy's address."""
        if not self._networks:
            return False
        try:
            ip = _plain(address)
        except ValueError:
            return False
        return any(ip.version == n.version and ip in n for n in self._networks)

    def client(self, peer: str, headers: Mapping[str, str]) -> str:
        """The client's address, from its connection and its headers."""
        if not self.trusts(peer):
            if any(name in headers for name in FORWARDING):
                self._on_stranger(peer)
            return peer
        client = peer
        for hop in _hops(headers)[: -self._hops - 1 : -1]:
            try:
                client = str(_plain(hop))
            except ValueError:
                break  # unknown or hidden: the proxy that says so is the last one known
            if not self.trusts(client):
                break
        return client


def _hops(headers: Mapping[str, str]) -> list[str]:
    """The addresses that proxies noted, the nearest last."""
    listed = headers.get("X-Forwarded-For")
    if listed is not None:
        return [_address(part) for part in listed[-MAX_HEADER:].split(",")[-MAX_HOPS:]]
    forwarded = headers.get("Forwarded")
    if forwarded is not None:
        return [_forwarded_for(part) for part in forwarded[-MAX_HEADER:].split(",")[-MAX_HOPS:]]
    real = headers.get("X-Real-IP")
    return [] if real is None else [_address(real)]


def _forwarded_for(element: str) -> str:
    """``for=`` of an element of Forwarded (RFC 7239)."""
    for pair in element.split(";"):
        name, _, value = pair.strip().partition("=")
        if name.lower() == "for":
            return _address(value)
    return ""


def _address(text: str) -> str:
    """An address without quotes, brackets and port."""
    text = text.strip().strip('"')
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text
