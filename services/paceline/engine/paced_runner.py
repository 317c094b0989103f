"""A runner whose steps take a given time at least: it stands for a device beside the processor.

For measuring how a fleet schedules and scales with real processes on a machine with few cores.
build.py puts it around the real runner, behind which the step cost was measured already.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from paceline.engine.ports import StepRunner
from paceline.engine.step import StepPlan, StepResult


class PacedRunner:
    """Sleeps what a step is too short by; what the step brings is the inner runner's."""

    def __init__(
        self, runner: StepRunner, min_step_s: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._runner = runner
        self._min_step_s = min_step_s
        self._sleep = sleep

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._runner.page_bytes

    def read_page(self, page: int, out: memoryview) -> None:
        """Copy a page's bytes into `out`."""
        self._runner.read_page(page, out)

    def write_page(self, page: int, data: memoryview) -> None:
        """Overwrite a page's bytes."""
        self._runner.write_page(page, data)

    def view_page(self, page: int) -> memoryview:
        """Return a page's bytes for hashing, valid until the next step."""
        return self._runner.view_page(page)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step and wait until its time is over."""
        started_s = time.perf_counter()
        result = self._runner.run(plan)
        left_s = self._min_step_s - (time.perf_counter() - started_s)
        if left_s <= 0:
            return result
        self._sleep(left_s)
        return replace(result, elapsed_s=time.perf_counter() - started_s)
