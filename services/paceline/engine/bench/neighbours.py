"""How much of the machine others used meanwhile: the first thing to know about a figure."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IDLE, _IOWAIT, _FIRST_GUEST = 3, 4, 8
"""Columns of /proc/stat; guest time is part of user time already."""


class Neighbours:
    """Watches from its creation on."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._others_s = _busy_s() - _own_s()

    def cpu_share(self) -> float | None:
        """Return the share of all processor time that other processes took, or None if unknown."""
        num_cpus = os.cpu_count() or 1
        total_s = num_cpus * (time.monotonic() - self._started_s)
        busy_s = _busy_s()
        if busy_s == 0 or total_s <= 0:
            return None
        share = (busy_s - _own_s() - self._others_s) / total_s
        return round(min(max(share, 0.0), 1.0), 3)


def _busy_s() -> float:
    """Return the time that all processors together spent on something; 0 where nobody says."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return 0.0
    ticks = [int(n) for n in line.split()[1 : 1 + _FIRST_GUEST]]
    busy = sum(ticks) - ticks[_IDLE] - ticks[_IOWAIT]
    return busy / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    return sum(os.times()[:2])
