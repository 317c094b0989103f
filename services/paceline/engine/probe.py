"""Times steps of chosen shapes on the real runner, before requests arrive.

The pages it scribbles on belong to nobody yet. Workers that start together share cores for
the moment: the time on the CPU tells what a step takes when they do not. cost.py fits what is
measured here, bench/cost.py checks the fit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paceline.domain.cost import StepShape
from paceline.domain.request import SamplingParams
from paceline.engine.ports import StepRunner
from paceline.engine.spec.tree import EMPTY_TREE, ROOT, DraftTree
from paceline.engine.step import Row, SampleSpec, StepPlan

_TOUCHED_BYTES = 256 << 20

_LEAST_RUNS, _MAX_RUNS = 2, 12
_CHEAP_S = 0.05
"""What may be spent on a step beyond its least runs: short steps are disturbed the most."""

_GREEDY = SampleSpec(SamplingParams(temperature=0.0), stream=0, position=1, num_logprobs=0)


@dataclass(frozen=True, slots=True)
class ProbeStep:
    """A step to time."""

    starts: tuple[int, ...] = ()
    """Tokens in front of each decoding row's one."""
    chunks: tuple[tuple[int, int], ...] = ()
    """(tokens, start) of each prompt chunk; none ends its prompt, so nothing is drawn."""
    nodes: int = 0
    """Draft tokens behind each decoding row's one."""

    @property
    def shape(self) -> StepShape:
        """What the cost model is told about it."""
        rows, attended = len(self.starts), sum(self.starts) + len(self.starts)
        shape = StepShape(
            rows=rows,
            tree_nodes=rows * self.nodes,
            attended=attended,
            tree_attended=self.nodes * attended,
        )
        for tokens, start in self.chunks:
            shape = shape.with_chunk(tokens, start)
        return shape


class StepTimer:
    """Runs probe steps over a page pool."""

    def __init__(
        self,
        runner: StepRunner,
        *,
        num_pages: int,
        block_size: int,
        cpu_s: Callable[[], float] = time.process_time,
    ) -> None:
        """`cpu_s` is the processor time of this process, summed over its threads."""
        self._runner = runner
        self._block_size = block_size
        self._cpu_s = cpu_s
        # Enough to be read from memory rather than from a cache, and no more: what is
        # touched stays in this process's memory.
        self._num_pages = max(1, min(num_pages, _TOUCHED_BYTES // runner.page_bytes))
        self._num_touched = 0

    def best_s(self, steps: list[ProbeStep]) -> list[float]:
        """Return each step's shortest run: of two, or of as many as cost little.

        All steps run in turn: what disturbs the machine for a second spoils one run of many
        steps, not all runs of one.
        """
        plans = [self._plan(step) for step in steps]
        best_s = [math.inf] * len(plans)
        for num_runs in range(_MAX_RUNS):
            for i, plan in enumerate(plans):
                if num_runs < _LEAST_RUNS or num_runs * best_s[i] < _CHEAP_S:
                    best_s[i] = min(best_s[i], self._undisturbed_s(plan))
        return best_s

    def _undisturbed_s(self, plan: StepPlan) -> float:
        """Time one run; the smaller of wall and processor time leaves out waiting for a core."""
        started_s = self._cpu_s()
        elapsed_s = self._runner.run(plan).elapsed_s
        return min(elapsed_s, self._cpu_s() - started_s)

    def _plan(self, step: ProbeStep) -> StepPlan:
        runs: list[tuple[int, int, SampleSpec | None]] = [(1, s, _GREEDY) for s in step.starts]
        runs += [(tokens, start, None) for tokens, start in step.chunks]
        rows, next_page, tree = [], 0, _bushy(step.nodes)
        for i, (tokens, start, sample) in enumerate(runs):
            draft = EMPTY_TREE if sample is None else tree
            count = -(-(start + tokens + len(draft)) // self._block_size)
            # Rows share pages only where the pool has too few.
            pages = (next_page + np.arange(count, dtype=np.int32)) % self._num_pages
            next_page += count
            self._touch(min(next_page, self._num_pages))
            ids = pages.astype(np.int32)
            rows.append(Row(i, (0,) * tokens, start, ids, sample, draft))
        return StepPlan(tuple(rows))

    def _touch(self, num_pages: int) -> None:
        """Give pages memory of their own; untouched ones all share one page of zeros."""
        nothing = memoryview(bytes(self._runner.page_bytes))
        for page in range(self._num_touched, num_pages):
            self._runner.write_page(page, nothing)
        self._num_touched = max(self._num_touched, num_pages)


def _bushy(num_nodes: int) -> DraftTree:
    """Return a draft of two nodes on every level, the first of which leads on.

    It has as many paths as levels, which is what drafts look like and what attention feels.
    """
    parents = tuple(max(ROOT, i - 2 - i % 2) for i in range(num_nodes))
    nothing = (0.0,) * num_nodes
    return DraftTree((0,) * num_nodes, parents, nothing, nothing, ("",) * num_nodes)
