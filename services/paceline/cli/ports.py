"""Local TCP ports: is one free, and which is."""

from __future__ import annotations

import errno
import socket

from paceline.cli.errors import CommandError


def require_free(host: str, port: int, flag: str) -> None:
    """Check that a server could listen at host:port; port 0 always can.

    Raises:
        CommandError: somebody listens there, or the address is none of ours.
    """
    if port == 0:
        return
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as sock:
            # Connections of an earlier server that still wind down are no obstacle.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} is taken; choose another with {flag} (0 = any free one)"
            raise CommandError(message) from error
        raise CommandError(f"{host}:{port} cannot be bound: {error.strerror}") from error


def free_port() -> int:
    """Return a port that is free on loopback now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
