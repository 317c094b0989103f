"""Turns a step plan into tensors, runs the model and draws tokens. Holds no queues.

Shape legend: N tokens of the step, R rows, M rows that are drawn from, B blocks per row,
P pages, L layers, K key/value heads, T tokens per block, D head size, E hidden size,
V vocabulary.
"""

from __future__ import annotations

import math
import mmap
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from paceline.engine.blocks import BlockPool
from paceline.engine.drawing import draw
from paceline.engine.kernels import AttentionBatch, move_kv
from paceline.engine.models.load import Model
from paceline.engine.recording import record
from paceline.engine.spec.lent_target import LentTarget
from paceline.engine.spec.tree import ROOT, DraftTree
from paceline.engine.step import NOTHING, Row, RowResult, StepPlan, StepResult

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

    def lend(self, pool: BlockPool, *, max_context_tokens: int) -> LentTarget:
        """Let drafters compute with the model and its KV, in pages of the pool."""
        return LentTarget(
            self._model,
            self._kv_PL2KTD,
            pool,
            block_size=self._block_size,
            max_context_tokens=max_context_tokens,
        )

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
        capture_s = 0.0
        for source, destination in plan.page_copies:
            self._kv_PL2KTD[destination].copy_(self._kv_PL2KTD[source])
        results = [NOTHING] * len(plan.rows)
        failed: set[int] = set()
        if plan.rows:
            x_NE = self._residuals(plan)
            failed |= _rows_with_nan(plan, x_NE)
            if any(row.sample is not None for row in plan.rows):
                logits_MV = self._model.logits(x_NE, _places(plan))
                results = draw(plan.rows, logits_MV, plan.wanted.successors)
                for i, (row, result) in enumerate(zip(plan.rows, results, strict=True)):
                    if row.sample is not None and not result.tokens:
                        failed.add(i)
                self._settle(plan.rows, results)
                if plan.wanted.hidden:
                    results = self._with_hidden(plan.rows, results, x_NE)
                if plan.captured.sequence_ids:
                    begun_s = time.thread_time()
                    results = record(plan, results, logits_MV, partial(self._model.hidden, x_NE))
                    capture_s = time.thread_time() - begun_s
        elapsed_s = time.perf_counter() - started
        return StepResult(tuple(results), elapsed_s, frozenset(failed), capture_s)

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Compute the plan's rows and return float32 logits of the places to draw at, [M, V]."""
        return self._model.logits(self._residuals(plan), _places(plan))

    def _settle(self, rows: tuple[Row, ...], results: list[RowResult]) -> None:
        """Move the KV of accepted nodes to the slots behind their rows' own tokens."""
        sources: list[int] = []
        destinations: list[int] = []
        for row, result in zip(rows, results, strict=True):
            end = row.start + len(row.token_ids)
            for depth, node in enumerate(result.path):
                # Nodes of a path rise and come after as many others: a source never lies in
                # front of its destination.
                if node != depth:
                    sources.append(self._slot(row, end + node))
                    destinations.append(self._slot(row, end + depth))
        if sources:
            move_kv(self._kv_PL2KTD, torch.tensor(sources), torch.tensor(destinations))

    def _with_hidden(
        self, rows: tuple[Row, ...], results: list[RowResult], x_NE: torch.Tensor
    ) -> list[RowResult]:
        """Add the hidden state behind which each row's last token was drawn."""
        places: list[int] = []
        begin = 0
        for row, result in zip(rows, results, strict=True):
            if result.tokens:
                last = result.path[-1] if result.path else ROOT
                places.append(begin + len(row.token_ids) + last)
            begin += row.num_tokens
        hidden = iter(self._model.hidden(x_NE, torch.tensor(places, dtype=torch.int64)).unbind())
        return [replace(r, hidden_E=next(hidden)) if r.tokens else r for r in results]

    def _slot(self, row: Row, at: int) -> int:
        size = self._block_size
        return int(row.pages[at // size]) * size + at % size

    def _residuals(self, plan: StepPlan) -> torch.Tensor:
        """Compute the plan's rows; return the last layer's residuals, [N, E]."""
        rows = plan.rows
        lengths_R = np.array([row.num_tokens for row in rows], dtype=np.int32)
        cu_q = _ends(lengths_R)
        starts_R = np.array([row.start for row in rows], dtype=np.int32)
        tokens_N = np.concatenate(
            [np.array(row.token_ids + row.tree.tokens, dtype=np.int64) for row in rows]
        )
        # Where a token lies among the row's slots, which for nodes is not its position.
        places_N = np.concatenate(
            [np.arange(row.start, row.start + row.num_tokens, dtype=np.int64) for row in rows]
        )
        positions_N = places_N
        tables_RB = _block_tables(rows)
        row_of_N = np.repeat(np.arange(len(rows)), lengths_R)
        pages_N = tables_RB[row_of_N, places_N // self._block_size]
        slots_N = pages_N.astype(np.int64) * self._block_size + places_N % self._block_size
        trees = [() if row.tree.is_chain else _tail(row.tree) for row in rows]
        cu_tree, parents = None, None
        if any(trees):
            positions_N = _positions(rows)
            cu_tree = torch.from_numpy(_ends(np.array([len(t) for t in trees], dtype=np.int32)))
            parents = torch.tensor([p for t in trees for p in t], dtype=torch.int32)
        attention = AttentionBatch(
            cu_q=torch.from_numpy(cu_q),
            kv_lens=torch.from_numpy(starts_R + lengths_R),
            block_tables=torch.from_numpy(tables_RB),
            block_size=self._block_size,
            max_q=int(lengths_R.max()),
            cu_tree=cu_tree,
            tree_parents=parents,
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


def _ends(lengths: np.ndarray) -> np.ndarray:
    """Return where runs of such lengths begin and end, laid behind each other."""
    ends = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=ends[1:])
    return ends


def _tail(tree: DraftTree) -> tuple[int, ...]:
    """Return the parents of a row's last token and of the nodes under it, as attention counts."""
    return (ROOT, *[parent + 1 for parent in tree.parents])


def _positions(rows: tuple[Row, ...]) -> np.ndarray:
    """Return each token's position in its sequence, int64 [N]."""
    positions: list[int] = []
    for row in rows:
        end = row.start + len(row.token_ids)
        positions += range(row.start, end)
        positions += [end - 1 + depth for depth in row.tree.depths]
    return np.array(positions, dtype=np.int64)


def _places(plan: StepPlan) -> torch.Tensor:
    """Return the step's indices of the tokens to draw behind, drafts included, [M]."""
    places: list[int] = []
    end = 0
    for row in plan.rows:
        end += row.num_tokens
        if row.sample is not None:
            places += range(end - len(row.tree) - 1, end)
    return torch.tensor(places)


def _rows_with_nan(plan: StepPlan, x_NE: torch.Tensor) -> set[int]:
    """Name the rows of which a token is not finite; a draft's nodes are their own affair."""
    is_finite_N = x_NE.isfinite().all(dim=-1)
    if bool(is_finite_N.all()):
        return set()
    per_row = is_finite_N.split([row.num_tokens for row in plan.rows])
    return {
        i
        for i, (row, is_finite) in enumerate(zip(plan.rows, per_row, strict=True))
        if not bool(is_finite[: len(row.token_ids)].all())
    }


def _block_tables(rows: tuple[Row, ...]) -> np.ndarray:
    width = max(len(row.pages) for row in rows)
    tables = np.zeros((len(rows), width), dtype=np.int32)
    for i, row in enumerate(rows):
        tables[i, : len(row.pages)] = row.pages
    return tables
