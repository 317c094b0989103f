"""What this machine allows: read bandwidth and matrix rates, from which bounds follow.

Bandwidth is the median of repeated passes over 1 GiB, with 4 KiB and with 2 MiB pages, the
faster of the two: sustained, since on a shared host single passes can be far faster than the
rest. Matrix rates are the best of several sizes.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_NUM_FLOATS = 1 << 28
"""1 GiB, far past any cache."""

_SIZES = ((2048, 2048, 2048), (1024, 4096, 4096), (512, 576, 1536), (512, 896, 4864))
"""Rows, inner and columns of timed products: large ones, and layers of small models."""

_BUDGET_S = 2.0
_PRODUCT_BUDGET_S = 0.3
_LEAST_RUNS = 3


@dataclass(frozen=True, slots=True)
class MachineRates:
    """Sustained rates of one machine with one number of threads."""

    read_4k_gb_s: float
    read_2m_gb_s: float
    gflops: dict[str, float]
    """By dtype; integer operations for int8."""

    @property
    def read_gb_s(self) -> float:
        """Read bandwidth on the better pages."""
        return max(self.read_4k_gb_s, self.read_2m_gb_s)


@torch.inference_mode()
def measure_machine(threads: int) -> MachineRates:
    """Measure; takes about ten seconds."""
    torch.set_num_threads(threads)
    return MachineRates(
        read_4k_gb_s=_read_gb_s(mmap.MADV_NOHUGEPAGE),
        read_2m_gb_s=_read_gb_s(mmap.MADV_HUGEPAGE),
        gflops={
            "f32": _product_gflops(torch.float32),
            "bf16": _product_gflops(torch.bfloat16),
            "int8": _product_gflops(torch.int8),
        },
    )


def _read_gb_s(advice: int) -> float:
    memory = mmap.mmap(-1, 4 * _NUM_FLOATS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    x = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)
    times = _times_s(lambda: x.sum(), _BUDGET_S)
    return 4 * _NUM_FLOATS / times[len(times) // 2] / 1e9


def _product_gflops(dtype: torch.dtype) -> float:
    best = 0.0
    for m, k, n in _SIZES:
        times = _times_s(_product(dtype, m, k, n), _PRODUCT_BUDGET_S)
        best = max(best, 2 * m * k * n / times[0] / 1e9)
    return best


def _product(dtype: torch.dtype, m: int, k: int, n: int) -> Callable[[], object]:
    if dtype == torch.int8:
        a = torch.randint(-127, 127, (m, k), dtype=dtype)
        b = torch.randint(-127, 127, (k, n), dtype=dtype)
        return lambda: torch._int_mm(a, b)
    # The second factor as weights lie: one row per output.
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    return lambda: torch.mm(x, weight.t())


def _times_s(run: Callable[[], object], budget_s: float) -> list[float]:
    """Return sorted times of repeated runs, after one that is not counted."""
    run()
    times: list[float] = []
    end_s = time.perf_counter() + budget_s
    while len(times) < _LEAST_RUNS or time.perf_counter() < end_s:
        started_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - started_s)
    return sorted(times)
