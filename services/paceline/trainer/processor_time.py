"""Processor time of another process, as Linux counts it to the nanosecond; None elsewhere."""

from __future__ import annotations

import sys
import time

_SCHEDULED = 2
"""CPUCLOCK_SCHED of linux/posix-timers.h; the clock of a process is (~pid << 3) | this."""


def processor_time_s(pid: int) -> float | None:
    """Return the seconds that all threads of a process have computed; None if it is gone."""
    if sys.platform != "linux":
        return None
    try:
        return time.clock_gettime((~pid << 3) | _SCHEDULED)
    except OSError:
        return None
