"""Measures what a step costs on this machine, for every decision made in seconds.

Steps of different shapes are timed on the real runner (probe.py) and fitted (cost_fit.py);
domain/cost.py states the model. cost_store.py keeps the fit for the next start, which then
only checks it. build.py calls this file before requests arrive.
"""

from __future__ import annotations

from paceline.domain.cost import StepCost
from paceline.engine.cost_fit import Grid, fit_step_cost
from paceline.engine.cost_store import CostKey, CostStore
from paceline.engine.probe import ProbeStep, StepTimer

_ROWS = (1, 2, 4, 8, 16, 17, 24, 32)
"""Decoding rows that are timed; kernels work in tiles of 16, so the first row of a second
tile is one of them."""

_CHUNKS = (1, 2, 8, 16, 32, 64, 128, 256, 512)
"""Chunk sizes that are timed, as far as a step may have them."""

_SHORT, _MIDDLE, _LONG, _LONGEST = 16, 512, 1024, 1536
"""Contexts of timed steps, as far as a sequence may have them."""

_NODES = (1, 2, 4, 8, 16, 32)
"""Draft tokens in all that are timed."""

MAX_TIMED_CONTEXT = 1600
"""No timed step needs longer sequences; what lies behind is extrapolated."""

_CONTEXTS = (0, 2048, 8192, 16384, 32768)
"""Where the curve over contexts may bend: what the timed steps attend to, nearly."""

_MAX_DRIFT = 0.3
"""How far a kept fit may be off before it is measured again; runs differ by a tenth."""


def known_step_cost(store: CostStore, key: CostKey, timer: StepTimer) -> StepCost:
    """Return the kept fit if three steps agree with it, else a new one, which is kept."""
    sizes = {"max_context_tokens": key.max_context_tokens, "chunk": key.chunk_tokens}
    # Workers that start together need the same fit: one measures, undisturbed, the others wait.
    with store.exclusive(key):
        kept = store.load(key)
        if kept is not None and is_still_true(kept, timer, **sizes):
            return kept
        cost = measure_step_cost(timer, **sizes)
        store.save(key, cost)
        return cost


def measure_step_cost(timer: StepTimer, *, max_context_tokens: int, chunk: int) -> StepCost:
    """Time some 30 steps that decode, prefill and do both, and fit them."""
    chunks = _chunk_sizes(chunk, max_context_tokens)
    steps = _steps(chunks, max_context_tokens)
    seconds = timer.best_s(steps)
    grid = Grid(tokens=chunks, rows=(0, *_ROWS), contexts=_CONTEXTS, nodes=(0, *_NODES))
    return fit_step_cost([step.shape for step in steps], seconds, grid)


def is_still_true(cost: StepCost, timer: StepTimer, *, max_context_tokens: int, chunk: int) -> bool:
    """Time three steps and tell whether their prediction is near, by the middle one."""
    short, middle = (min(n, max_context_tokens - 1) for n in (_SHORT, _MIDDLE))
    largest = _chunk_sizes(chunk, max_context_tokens)[-1]
    steps = [
        ProbeStep(starts=(short,)),
        ProbeStep(starts=(middle,) * 4),
        ProbeStep(chunks=((min(64, largest), 0),)),
    ]
    measured_s = timer.best_s(steps)
    ratios = [cost.step_s(step.shape) / s for step, s in zip(steps, measured_s, strict=True)]
    middle_ratio = sorted(ratios)[len(ratios) // 2]
    return 1 / (1 + _MAX_DRIFT) <= middle_ratio <= 1 + _MAX_DRIFT


def _chunk_sizes(chunk: int, longest: int) -> tuple[int, ...]:
    largest = max(1, min(chunk, longest))
    return (*(c for c in _CHUNKS if c < largest), largest)


def _steps(chunks: tuple[int, ...], longest: int) -> list[ProbeStep]:
    """Return what is timed; no row is longer than `longest` tokens."""
    sizes = (_SHORT, _MIDDLE, _LONG, _LONGEST)
    short, middle, long, end = (min(n, longest - 1) for n in sizes)
    largest = chunks[-1]
    steps = [ProbeStep(starts=(short,) * rows) for rows in _ROWS]
    contexts = ((1, middle), (1, end), (4, middle), (8, long), (16, long), (24, long), (20, end))
    steps += [ProbeStep(starts=(start,) * rows) for rows, start in contexts]
    steps += [ProbeStep(chunks=((tokens, 0),)) for tokens in chunks]
    for tokens in sorted({min(16, largest), min(64, largest), min(128, largest)}):
        steps.append(ProbeStep(chunks=((tokens, max(0, min(long, longest - tokens))),)))
    mixed = ((4, short, 64), (8, middle, 64), (16, short, 16), (32, short, 32))
    for rows, start, tokens in mixed:
        chunk = (min(tokens, largest), 0)
        steps.append(ProbeStep((start,) * rows, (chunk,)))
    drafts = [(1, short, nodes) for nodes in _NODES]
    drafts += [(1, middle, 8), (1, end, 8), (1, middle, 16)]
    drafts += [(4, short, 8), (8, middle, 2), (16, short, 2)]
    for rows, start, nodes in drafts:
        nodes = min(nodes, longest - 2)
        steps.append(ProbeStep((min(start, longest - 1 - nodes),) * rows, nodes=max(0, nodes)))
    return steps
