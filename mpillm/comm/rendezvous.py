"""The meeting point of the ranks' heartbeats: addresses on which rank 0 listens, and a token of this world."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Rendezvous:
    """The addresses of rank 0, the token by which ranks recognise each other, and the limit of silence in seconds."""

    addresses: tuple[str, ...]
    port: int
    token: bytes
    limit: float


def listen(seconds: float) -> tuple[socket.socket, Rendezvous]:
    """Listen on all networks of this machine, on rank 0; `seconds` is the limit of silence."""
    listener = socket.socket()
    listener.bind(("", 0))
    listener.listen(128)
    return listener, Rendezvous(own_addresses(), listener.getsockname()[1], secrets.token_bytes(16), seconds)


def own_addresses() -> tuple[str, ...]:
    """Return this machine's IPv4 addresses without those of the loopback."""
    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not ipaddress.ip_address(address.address).is_loopback
    ]
    return tuple(found)
