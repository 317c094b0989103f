"""Which machine this is: the trainer counts spare capacity by machine."""

from __future__ import annotations

import socket
from pathlib import Path

_MACHINE_ID = Path("/etc/machine-id")


def machine_name() -> str:
    """Return what tells this machine from others; containers may share a host's id."""
    try:
        machine_id = _MACHINE_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        machine_id = ""
    return f"{socket.gethostname()}-{machine_id}" if machine_id else socket.gethostname()
