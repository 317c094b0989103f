"""Ways to get blocks from other nodes, chosen by the scheme of a node's URI."""

from __future__ import annotations

from collections import OrderedDict
from importlib import import_module
from urllib.parse import urlsplit

from paceline.domain.errors import InvalidRequestError
from paceline.kvstore.transport.base import KVTransport

__all__ = ["TRANSPORTS", "KVTransport", "Transports", "parse_uri"]

TRANSPORTS = {
    "grpc": "paceline.kvstore.transport.grpc_peer:GrpcTransport",
    "shm": "paceline.kvstore.transport.shm_peer:ShmTransport",
}
"""Scheme -> module:class, imported when used; constructed with the peer's host:port."""

MAX_PEERS = 64
"""Peers with an open connection; the one used longest ago is closed for another."""


def parse_uri(uri: str) -> tuple[str, str]:
    """Split `scheme:host:port` into scheme and address.

    Raises:
        InvalidRequestError: not of that form, or no transport of that scheme.
    """
    scheme, _, address = uri.partition(":")
    try:
        parts = urlsplit(f"//{address}")
        is_address = bool(parts.hostname) and parts.port is not None and parts.netloc == address
    except ValueError:
        is_address = False
    if scheme not in TRANSPORTS or not is_address or "@" in address:
        raise InvalidRequestError("source", "not a transport URI such as grpc:host:port")
    return scheme, address


class Transports:
    """Open transports by URI; `forced_scheme` overrides that of every URI."""

    def __init__(self, forced_scheme: str | None = None) -> None:
        self._forced_scheme = forced_scheme
        self._open: OrderedDict[tuple[str, str], KVTransport] = OrderedDict()

    async def to(self, uri: str) -> KVTransport:
        """Return the transport to a node; it stays owned by this object.

        Raises:
            InvalidRequestError: not a transport URI.
        """
        scheme, address = parse_uri(uri)
        target = (self._forced_scheme or scheme, address)
        if target not in self._open:
            self._open[target] = _create(*target)
        self._open.move_to_end(target)
        transport = self._open[target]
        if len(self._open) > MAX_PEERS:
            _, oldest = self._open.popitem(last=False)
            await oldest.close()
        return transport

    async def close(self) -> None:
        """Close all transports."""
        while self._open:
            _, transport = self._open.popitem()
            await transport.close()


def _create(scheme: str, address: str) -> KVTransport:
    module, _, cls = TRANSPORTS[scheme].partition(":")
    transport: KVTransport = getattr(import_module(module), cls)(address)
    return transport
