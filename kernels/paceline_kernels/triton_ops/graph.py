"""Decode steps as captured CUDA graphs: one launch instead of one per operation.

This file owns the static tensors that a captured step reads, the choice of the graph and the
padding; what a step computes is its caller's function. Needs no triton; capturing needs CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from paceline_kernels.reference import AttentionBatch

_NUM_WARM_UPS = 2
"""Runs before a capture: the first compiles kernels and opens libraries, which a capture
forbids; the second shows that nothing is left to do."""


@dataclass(frozen=True, slots=True)
class DecodeBuffers:
    """Inputs of a decode step of some rows, one token each, at addresses that never change.

    A padded row computes token 0 at position 0 with a context of one: the token itself, whose
    KV goes to the first slot of the padding page. Several rows write there, in any order; only
    padded rows read it, and their results are dropped.
    """

    tokens_R: torch.Tensor
    """[R] int64."""
    positions_R: torch.Tensor
    """[R] int64."""
    slots_R: torch.Tensor
    """[R] int64."""
    attention: AttentionBatch
    padding_page: int

    @staticmethod
    def empty(
        num_rows: int, num_blocks: int, block_size: int, padding_page: int, device: str
    ) -> DecodeBuffers:
        """Return buffers in which every row is padding."""
        attention = AttentionBatch(
            cu_q=torch.arange(num_rows + 1, dtype=torch.int32),
            kv_lens=torch.empty(num_rows, dtype=torch.int32, device=device),
            block_tables=torch.zeros(num_rows, num_blocks, dtype=torch.int32, device=device),
            block_size=block_size,
            max_q=1,
        )
        tokens_R, positions_R, slots_R = torch.empty(3, num_rows, dtype=torch.int64, device=device)
        buffers = DecodeBuffers(tokens_R, positions_R, slots_R, attention, padding_page)
        buffers.pad_from(0)
        return buffers

    def first(self, num_rows: int) -> DecodeBuffers:
        """Return the first rows, which share memory with these."""
        attention = AttentionBatch(
            cu_q=self.attention.cu_q[: num_rows + 1],
            kv_lens=self.attention.kv_lens[:num_rows],
            block_tables=self.attention.block_tables[:num_rows],
            block_size=self.attention.block_size,
            max_q=1,
        )
        return DecodeBuffers(
            self.tokens_R[:num_rows],
            self.positions_R[:num_rows],
            self.slots_R[:num_rows],
            attention,
            self.padding_page,
        )

    def fill(
        self,
        tokens_R: torch.Tensor,
        positions_R: torch.Tensor,
        slots_R: torch.Tensor,
        attention: AttentionBatch,
    ) -> None:
        """Copy a step of single tokens without trees in; the rows behind it become padding.

        Copies are queued on the current stream: sources in pinned memory must stay as they are
        until it has run. Entries of the block tables behind the step's are left as they were;
        they lie behind its contexts.
        """
        assert attention.cu_tree is None, "a graph's rows are plain"
        num_rows = tokens_R.shape[0]
        tables_RB = attention.block_tables
        for static, new in (
            (self.tokens_R, tokens_R),
            (self.positions_R, positions_R),
            (self.slots_R, slots_R),
            (self.attention.kv_lens, attention.kv_lens),
            (self.attention.block_tables[:, : tables_RB.shape[1]], tables_RB),
        ):
            static[:num_rows].copy_(new, non_blocking=True)
        self.pad_from(num_rows)

    def pad_from(self, row: int) -> None:
        """Turn the rows from this one on into padding."""
        self.tokens_R[row:] = 0
        self.positions_R[row:] = 0
        self.slots_R[row:] = self.padding_page * self.attention.block_size
        self.attention.kv_lens[row:] = 1
        self.attention.block_tables[row:, 0] = self.padding_page


class DecodeGraphs:
    """Graphs of one decode step, keyed by batch size.

    Used by one thread, on one stream. All sizes share the buffers of the largest, and their
    graphs share one pool of memory: only one of them runs at a time.
    """

    def __init__(
        self,
        step: Callable[[DecodeBuffers], torch.Tensor],
        sizes: Sequence[int],
        *,
        num_blocks: int,
        block_size: int,
        padding_page: int,
        device: str = "cuda",
    ) -> None:
        """Take the step, the batch sizes to capture and the widest block table, in pages.

        `step` maps buffers to a tensor with a row per row. It may not read results on the CPU
        nor copy from memory that is not pinned, and everything it reads apart from the buffers
        (weights, the pool) must stay where it is. `padding_page` belongs to nobody else.
        """
        self._step = step
        self._sizes = tuple(sorted(set(sizes)))
        self._buffers = DecodeBuffers.empty(
            self._sizes[-1], num_blocks, block_size, padding_page, device
        )
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def can_run(self, num_rows: int, num_blocks: int) -> bool:
        """Whether some size holds a step of so many rows and pages of context."""
        width = self._buffers.attention.block_tables.shape[1]
        return padded_size(num_rows, self._sizes) is not None and num_blocks <= width

    def capture(self) -> None:
        """Capture every size, the largest first: the smaller ones fit the memory it took."""
        pool = torch.cuda.graph_pool_handle()
        self._buffers.pad_from(0)
        for size in reversed(self._sizes):
            buffers = self._buffers.first(size)
            # What a capture forbids must happen before it, and not on the default stream.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_NUM_WARM_UPS):
                    self._step(buffers)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                out = self._step(buffers)
            self._graphs[size] = (graph, out)

    def run(
        self,
        tokens_R: torch.Tensor,
        positions_R: torch.Tensor,
        slots_R: torch.Tensor,
        attention: AttentionBatch,
    ) -> torch.Tensor:
        """Replay the smallest graph that holds the step; returns a row per row.

        The result is the graph's own memory and lasts until the next run, of any size.

        Raises:
            ValueError: no size holds the step, see `can_run`; or nothing is captured.
        """
        num_rows = tokens_R.shape[0]
        if not self.can_run(num_rows, attention.block_tables.shape[1]):
            raise ValueError(f"no graph holds {num_rows} rows of {attention.block_tables.shape}")
        size = padded_size(num_rows, self._sizes)
        if size not in self._graphs:
            raise ValueError("capture() comes before run()")
        graph, out = self._graphs[size]
        self._buffers.first(size).fill(tokens_R, positions_R, slots_R, attention)
        graph.replay()
        return out[:num_rows]


def batch_sizes(max_rows: int) -> tuple[int, ...]:
    """Return sizes to capture: 1, 2, 4, 8, then every multiple of 8 up to 64, then of 32.

    Padding adds at most 31 rows, few of what a step of that size computes; small steps, which
    read far more than they compute, are padded by 7 at most.
    """
    sizes = [1, 2, 4, *range(8, min(max_rows, 64), 8), *range(64, max_rows, 32)]
    return (*(size for size in sizes if size < max_rows), max_rows)


def padded_size(num_rows: int, sizes: Sequence[int]) -> int | None:
    """Return the smallest size that holds the rows; sizes ascend."""
    return next((size for size in sizes if size >= num_rows > 0), None)
