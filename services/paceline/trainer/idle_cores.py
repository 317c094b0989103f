"""How many cores of this machine do nothing, as Linux counts them; None elsewhere.

spare.py takes the figure: others than workers may compute here too.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

PROC_STAT = Path("/proc/stat")

_MIN_TICKS = 4
"""Of all cores together between two readings: fewer say nothing."""


class IdleCores:
    """Reads the idle share of some cores since the last reading."""

    def __init__(self, cores: Collection[int], path: Path = PROC_STAT) -> None:
        """`cores` are those that this process may use (os.sched_getaffinity)."""
        self._names = {f"cpu{core}" for core in cores}
        self._path = path
        self._last: tuple[int, int] | None = None

    def read(self) -> float | None:
        """Return the number of idle cores since the last reading; None if that cannot be told."""
        now = self._ticks()
        if now is None:
            return None
        if self._last is None:
            self._last = now
            return None
        idle, total = now[0] - self._last[0], now[1] - self._last[1]
        if total < _MIN_TICKS:
            return None
        self._last = now
        return len(self._names) * min(1.0, max(0.0, idle / total))

    def _ticks(self) -> tuple[int, int] | None:
        """Return idle and all ticks of the cores; waiting for a disk is idle, a guest is user."""
        idle = total = found = 0
        try:
            lines = self._path.read_text(encoding="ascii").splitlines()
            for line in lines:
                name, *fields = line.split()
                if name in self._names:
                    ticks = [int(field) for field in fields[:8]]
                    idle, total, found = idle + ticks[3] + ticks[4], total + sum(ticks), found + 1
        except (OSError, ValueError, IndexError):
            return None
        return (idle, total) if found == len(self._names) else None
