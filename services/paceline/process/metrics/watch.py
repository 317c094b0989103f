"""Measures what the interpreter does to a process: late event loops and garbage collection."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.process.metrics.book import Metrics

LOOP_PERIOD_S = 0.1
"""Ten timers per second take about 0.1 ms of processor time."""


def watch_delay(loop: asyncio.AbstractEventLoop, observe: Callable[[float], None]) -> None:
    """Tell how late the loop calls what is due, as long as it runs."""

    def look(due_s: float) -> None:
        now_s = loop.time()
        observe(max(0.0, now_s - due_s))
        loop.call_at(now_s + LOOP_PERIOD_S, look, now_s + LOOP_PERIOD_S)

    first_s = loop.time() + LOOP_PERIOD_S
    loop.call_at(first_s, look, first_s)


def watch_gc(metrics: Metrics) -> None:
    """Count collections and their time for as long as `metrics` lives."""
    begun_s = 0.0
    counts = [metrics.gc_collections.labels(n) for n in range(3)]
    times = [metrics.gc_seconds.labels(n) for n in range(3)]

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal begun_s
        if phase == "start":
            begun_s = time.perf_counter()
            return
        counts[info["generation"]].inc()
        times[info["generation"]].inc(time.perf_counter() - begun_s)

    gc.callbacks.append(note)
    weakref.finalize(metrics, gc.callbacks.remove, note).atexit = False
