"""Turns a step plan into tensors, runs the model and draws tokens. Holds no queues.

Shape legend: N tokens of the step, R rows, M rows that are drawn from, B blocks per row,
P pages, L layers, K key/value heads, T tokens per block, D head size, E hidden size,
V vocabulary.
"""

from __future__ import annotations

import math
import mmap
import time

import numpy as np
import torch

from paceline.engine.kernels import AttentionBatch
from paceline.engine.models.load import Model
from paceline.engine.sampling.sampler import sample
from paceline.engine.step import Row, SampledToken, StepPlan, StepResult

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Runner:
    """One model and its page pool on one device."""

    def __init__(
        self, model: Model, *, num_pages: int, block_size: int, dtype: torch.dtype
    ) -> None:
        config = model.config
        self._model = model
        self._block_size = block_size
        # Page-major: a page holds K and V of all layers in one run of bytes, so moving a block
        # to or from the KV store is one copy.
        shape = (num_pages, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
        self._kv_PL2KTD = _zeros_on_huge_pages(shape, dtype)
        self._bytes_P = self._kv_PL2KTD.view(num_pages, -1).view(torch.uint8).numpy()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return int(self._bytes_P.shape[1])

    def read_page(self, page: int, out: memoryview) -> None:
        """Copy a page's bytes into `out`."""
        np.copyto(np.frombuffer(out, dtype=np.uint8), self._bytes_P[page])

    def write_page(self, page: int, data: memoryview) -> None:
        """Overwrite a page's bytes."""
        np.copyto(self._bytes_P[page], np.frombuffer(data, dtype=np.uint8))

    def view_page(self, page: int) -> memoryview:
        """Return a page's bytes without copying."""
        return memoryview(self._bytes_P[page])

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Copy pages, compute all rows in one pass, draw where the plan says so.

        Rows whose numbers are not finite are named in the result; they do not touch others.
        """
        started = time.perf_counter()
        for source, destination in plan.page_copies:
            self._kv_PL2KTD[destination].copy_(self._kv_PL2KTD[source])
        sampled: list[SampledToken | None] = [None] * len(plan.rows)
        failed: set[int] = set()
        if plan.rows:
            x_NE = self._residuals(plan)
            failed |= _rows_with_nan(plan, x_NE)
            drawn = [i for i, row in enumerate(plan.rows) if row.sample is not None]
            if drawn:
                logits_MV = self._model.logits(x_NE, _last_tokens(plan))
                specs = [row.sample for row in plan.rows if row.sample is not None]
                for i, token in zip(drawn, sample(logits_MV, specs), strict=True):
                    sampled[i] = token
                    if token is None:
                        failed.add(i)
        return StepResult(tuple(sampled), time.perf_counter() - started, frozenset(failed))

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Compute the plan's rows and return float32 logits of the rows to draw from, [M, V]."""
        return self._model.logits(self._residuals(plan), _last_tokens(plan))

    def _residuals(self, plan: StepPlan) -> torch.Tensor:
        """Compute the plan's rows; return the last layer's residuals, [N, E]."""
        rows = plan.rows
        lengths_R = np.array([len(row.token_ids) for row in rows], dtype=np.int32)
        cu_q = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(lengths_R, out=cu_q[1:])
        starts_R = np.array([row.start for row in rows], dtype=np.int32)
        tokens_N = np.concatenate([np.array(row.token_ids, dtype=np.int64) for row in rows])
        positions_N = np.concatenate(
            [np.arange(row.start, row.start + len(row.token_ids), dtype=np.int64) for row in rows]
        )
        tables_RB = _block_tables(rows)
        row_of_N = np.repeat(np.arange(len(rows)), lengths_R)
        pages_N = tables_RB[row_of_N, positions_N // self._block_size]
        slots_N = pages_N.astype(np.int64) * self._block_size + positions_N % self._block_size
        attention = AttentionBatch(
            cu_q=torch.from_numpy(cu_q),
            kv_lens=torch.from_numpy(starts_R + lengths_R),
            block_tables=torch.from_numpy(tables_RB),
            block_size=self._block_size,
            max_q=int(lengths_R.max()),
            tree_mask=None,
        )
        return self._model.forward(
            torch.from_numpy(tokens_N),
            torch.from_numpy(positions_N),
            self._kv_PL2KTD,
            torch.from_numpy(slots_N),
            attention,
        )


def _zeros_on_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Map zeros that take memory as they are touched, on 2 MiB pages where the kernel has them."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _last_tokens(plan: StepPlan) -> torch.Tensor:
    """Return the step's positions of the tokens to draw behind, [M]."""
    ends_R = np.cumsum([len(row.token_ids) for row in plan.rows])
    return torch.from_numpy(ends_R[[row.sample is not None for row in plan.rows]] - 1)


def _rows_with_nan(plan: StepPlan, x_NE: torch.Tensor) -> set[int]:
    is_finite_N = x_NE.isfinite().all(dim=-1)
    if bool(is_finite_N.all()):
        return set()
    per_row = is_finite_N.split([len(row.token_ids) for row in plan.rows])
    return {i for i, is_finite in enumerate(per_row) if not bool(is_finite.all())}


def _block_tables(rows: tuple[Row, ...]) -> np.ndarray:
    width = max(len(row.pages) for row in rows)
    tables = np.zeros((len(rows), width), dtype=np.int32)
    for i, row in enumerate(rows):
        tables[i, : len(row.pages)] = row.pages
    return tables
