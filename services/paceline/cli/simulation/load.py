"""Makes a load of a trace: a part of it, or a multiple.

A multiple keeps the trace's time: `factor` 2.5 is two copies, one of them moved by seconds at
random, and half the requests of a third. Compressing time instead would also make every lull and
every rise shorter, and so harder to follow than the recorded ones. Copies share no prefixes with
each other: they are other users.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from paceline.cli.simulation.traces import Arrival, Trace

JITTER_S = 5.0
"""Arrivals of copies move by up to this much, so that they do not come together."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What is taken of a trace."""

    factor: float = 1.0
    """Multiple of the trace's rate."""
    limit_s: float | None = None
    """Only requests that come before."""
    seed: int = 0


def make_load(trace: Trace, options: LoadOptions) -> tuple[Arrival, ...]:
    """Return the arrivals in order of time; the same for the same seed."""
    limit_s = math.inf if options.limit_s is None else options.limit_s
    base = [arrival for arrival in trace.arrivals if arrival.at_s < limit_s]
    num_copies = math.floor(options.factor)
    stride = 1 + max((i for a in base for i in a.prefix_ids), default=0)
    load = list(base) if num_copies else []
    for copy in range(1, num_copies):
        load += _copy(base, copy, stride, 1.0, options.seed)
    rest = options.factor - num_copies
    if rest > 0:
        copy = num_copies
        load += _copy(base, copy, stride, rest, options.seed)
    load.sort(key=lambda arrival: arrival.at_s)
    return tuple(load)


def _copy(base: list[Arrival], copy: int, stride: int, share: float, seed: int) -> list[Arrival]:
    # The trace itself is never moved: a factor below 1 only thins.
    draw = random.Random(f"{seed}/{copy}")
    copied = []
    for arrival in base:
        moved_s = draw.uniform(0.0, JITTER_S) if copy else 0.0
        if draw.random() < share:
            ids = tuple(i + copy * stride for i in arrival.prefix_ids)
            copied.append(replace(arrival, at_s=arrival.at_s + moved_s, prefix_ids=ids))
    return copied
