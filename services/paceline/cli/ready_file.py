"""The file by which `paceline up` tells scripts where everything is."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROLES = (
    "gateway",
    "prefill",
    "decode",
    "kvstore",
    "trainer",
    "autoscaler",
    "prometheus",
    "redis",
)
"""Keys of `processes`; a role that this platform lacks has an empty list."""


def write_ready_file(
    path: Path, addresses: Mapping[str, str], processes: Mapping[str, Sequence[int]]
) -> None:
    """Write the file in one step, so that readers see the old content or the new.

    Only the user may read it: the Redis URL can hold a password.
    """
    content = {
        **addresses,
        "processes": {role: list(processes.get(role, ())) for role in ROLES},
    }
    fd, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
