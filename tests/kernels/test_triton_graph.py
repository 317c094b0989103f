"""What surrounds captured decode steps: sizes, padding, and that padding touches nobody."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline_kernels import AttentionBatch
from tests.kernels.triton_interpreter import triton_ops, uses_interpreter

__all__ = ["uses_interpreter"]

padded_size = triton_ops.graph.padded_size


@given(st.integers(1, 600))
def test_sizes_cover_every_batch_once(max_rows: int) -> None:
    sizes = triton_ops.batch_sizes(max_rows)
    assert sizes[0] == 1
    assert sizes[-1] == max_rows
    assert list(sizes) == sorted(set(sizes))
    # Between captured sizes lie at most 32 rows.
    assert all(b - a <= 32 for a, b in pairwise(sizes))


@given(st.integers(-1, 70), st.sets(st.integers(1, 64), min_size=1))
def test_the_smallest_size_that_holds_the_rows(num_rows: int, sizes: set[int]) -> None:
    fitting = [size for size in sizes if num_rows >= 1 and size >= num_rows]
    assert padded_size(num_rows, sorted(sizes)) == min(fitting, default=None)


class Step:
    """One attention layer: stores values made of the token, attends, and counts its rows."""

    def __init__(self, num_pages: int, block_size: int) -> None:
        self.pool = torch.full((num_pages, 2, 1, block_size, 16), float("nan"))
        self.embedding = torch.randn(50, 3, 16)

    def __call__(self, step: Any) -> torch.Tensor:
        q, k, v = self.embedding[step.tokens_R].unsqueeze(2).unbind(1)
        triton_ops.write_kv(k, v, self.pool, step.slots_R)
        out: torch.Tensor = triton_ops.paged_attention(q, self.pool, step.attention, 0.25)
        return out


def test_padded_rows_touch_their_page_only_and_change_no_bit() -> None:
    block_size, padding_page = 4, 5
    step = Step(num_pages=6, block_size=block_size)
    step.pool[:4] = torch.randn(4, 2, 1, block_size, 16)
    buffers = triton_ops.DecodeBuffers.empty(4, 3, block_size, padding_page, "cpu")
    step(buffers)
    attention = AttentionBatch(
        cu_q=torch.tensor([0, 1, 2], dtype=torch.int32),
        kv_lens=torch.tensor([7, 3], dtype=torch.int32),
        # Narrower than the buffers' own.
        block_tables=torch.tensor([[2, 0], [3, 1 << 20]], dtype=torch.int32),
        block_size=block_size,
        max_q=1,
    )
    tokens, positions = torch.tensor([8, 9]), torch.tensor([6, 2])
    slots = torch.tensor([2, 14])
    before = step.pool.clone()
    buffers.fill(tokens, positions, slots, attention)
    padded = step(buffers)
    touched = (step.pool != before) & ~(step.pool.isnan() & before.isnan())
    changed = {(page, at) for page, _, _, at, _ in touched.nonzero().tolist()}
    assert changed <= {(0, 2), (3, 2), (padding_page, 0)}
    assert padded.isfinite().all()

    alone = step(triton_ops.DecodeBuffers(tokens, positions, slots, attention, padding_page))
    assert torch.equal(padded[:2], alone)
    # The rows of a smaller graph are the same memory.
    assert torch.equal(step(buffers.first(2)), alone)
    assert buffers.first(2).tokens_R.data_ptr() == buffers.tokens_R.data_ptr()

    buffers.fill(tokens[1:], positions[1:], slots[1:], narrowed(attention))
    assert torch.equal(step(buffers)[:1], alone[1:])
    assert buffers.slots_R.tolist() == [14, *[padding_page * block_size] * 3]
    assert buffers.attention.kv_lens.tolist() == [3, 1, 1, 1]
    assert buffers.attention.block_tables[:, 0].tolist() == [3, *[padding_page] * 3]


def narrowed(attention: AttentionBatch) -> AttentionBatch:
    """Return the second of two rows."""
    return AttentionBatch(
        cu_q=torch.tensor([0, 1], dtype=torch.int32),
        kv_lens=attention.kv_lens[1:],
        block_tables=attention.block_tables[1:],
        block_size=attention.block_size,
        max_q=1,
    )


def test_a_step_no_graph_holds_is_refused() -> None:
    graphs = triton_ops.DecodeGraphs(
        Step(2, 4), [4, 1, 2], num_blocks=2, block_size=4, padding_page=1, device="cpu"
    )
    assert graphs.can_run(4, 2)
    assert not graphs.can_run(5, 2)
    assert not graphs.can_run(1, 3)
    ids = torch.zeros(1, dtype=torch.int64)
    tables = torch.zeros(1, 2, dtype=torch.int32)
    attention = AttentionBatch(torch.tensor([0, 1]), torch.ones(1), tables, 4, 1)
    with pytest.raises(ValueError, match="capture"):
        graphs.run(ids, ids, ids, attention)
    with pytest.raises(ValueError, match="no graph holds"):
        graphs.run(ids.repeat(5), ids, ids, attention)
