"""Triton's paged attention, interpreted, against torch's attention and the reference."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline_kernels import AttentionBatch, paged_attention
from tests.kernels.test_attention import (
    TOLERANCE,
    Case,
    make_case,
    random_tails,
    random_tree,
    reference,
)
from tests.kernels.triton_interpreter import examples, triton_ops, uses_interpreter

__all__ = ["uses_interpreter"]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@pytest.fixture(autouse=True, scope="module")
def small_parts() -> Any:
    """Parts of two blocks, so that short contexts have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_ops.attention, "SPLIT_TOKENS", 32)
        patch.setattr(triton_ops.attention, "BLOCK_TOKENS", 16)
        yield


def attend(case: Case, window: int | None = None) -> torch.Tensor:
    scale = case.q_NHD.shape[-1] ** -0.5
    out: torch.Tensor = triton_ops.paged_attention(
        case.q_NHD, case.pool, case.batch, scale, window=window
    )
    return out


def assert_close(
    case: Case, window: int | None = None, tails: list[list[int]] | None = None
) -> None:
    ours = attend(case, window)
    assert ours.dtype == case.q_NHD.dtype
    tolerance = TOLERANCE[case.q_NHD.dtype]
    expected = reference(case, window, tails)
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)
    plain = paged_attention(
        case.q_NHD, case.pool, case.batch, case.q_NHD.shape[-1] ** -0.5, window=window
    )
    torch.testing.assert_close(ours, plain, rtol=2 * tolerance, atol=2 * tolerance)


@DTYPES
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_head_sizes(dtype: torch.dtype, size: int) -> None:
    lengths = [(40, 1), (7, 12), (0, 1)]
    assert_close(
        make_case(lengths, heads=4, kv_heads=1, size=size, block_size=16, dtype=dtype), window=33
    )


@examples(14)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 12)), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (8, 1), (5, 1)]),
    block_size=st.sampled_from([1, 3, 16, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([None, 1, 5, 33, 1000]),
    is_tree=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_batch(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
    is_tree: bool,
    seed: int,
) -> None:
    rng = random.Random(seed)
    tails = random_tails(lengths, rng) if is_tree else None
    case = make_case(
        lengths,
        heads=heads[0],
        kv_heads=heads[1],
        size=16,
        block_size=block_size,
        dtype=dtype,
        tails=tails,
        seed=seed,
    )
    assert_close(case, window, tails)


@examples(7)
@given(
    lengths=st.lists(st.integers(0, 120), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([None, 7, 50]),
)
def test_any_batch_of_single_tokens(
    lengths: list[int], dtype: torch.dtype, window: int | None
) -> None:
    case = make_case(
        [(before, 1) for before in lengths],
        heads=4,
        kv_heads=2,
        size=16,
        block_size=16,
        dtype=dtype,
    )
    assert_close(case, window)


@DTYPES
@pytest.mark.parametrize("window", [None, 20])
def test_trees_of_all_kinds(dtype: torch.dtype, window: int | None) -> None:
    """A row of several tiles, one without a tree, and lone tokens of older trees."""
    rng = random.Random(1)
    lengths = [(20, 8), (3, 70), (33, 1), (60, 1), (9, 30)]
    tails = [random_tree(count, rng) for count in (8, 72, 12, 61, 0)]
    case = make_case(lengths, heads=2, kv_heads=1, size=16, block_size=4, dtype=dtype, tails=tails)
    assert_close(case, window, tails)
    lone = make_case(
        [(33, 1), (60, 1)],
        heads=2,
        kv_heads=1,
        size=16,
        block_size=4,
        dtype=dtype,
        tails=tails[2:4],
    )
    assert_close(lone, window, tails[2:4])


def row_of(case: Case, row: int) -> Case:
    """Return a row as a batch of its own over the same pool."""
    batch = case.batch
    first, last = int(batch.cu_q[row]), int(batch.cu_q[row + 1])
    alone = AttentionBatch(
        cu_q=torch.tensor([0, last - first], dtype=torch.int32),
        kv_lens=batch.kv_lens[row : row + 1],
        block_tables=batch.block_tables[row : row + 1],
        block_size=batch.block_size,
        max_q=last - first,
    )
    return replace(case, q_NHD=case.q_NHD[first:last], batch=alone)


@DTYPES
@pytest.mark.parametrize("window", [None, 40])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, window: int | None) -> None:
    lengths = [(70, 1), (31, 1), (33, 9)]
    case = make_case(lengths, heads=4, kv_heads=1, size=16, block_size=16, dtype=dtype)
    together = attend(case, window).split(case.q_lens)
    for row in range(len(lengths)):
        assert torch.equal(attend(row_of(case, row), window), together[row])


@DTYPES
def test_who_does_the_parts_changes_no_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(
        [(120, 1), (33, 4), (5, 1)], heads=4, kv_heads=2, size=16, block_size=16, dtype=dtype
    )
    results = []
    for programs in (1, 12, 512):  # One program per row, two, and one per part.
        monkeypatch.setattr(triton_ops.attention, "TARGET_PROGRAMS", programs)
        results.append(attend(case))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@DTYPES
@pytest.mark.parametrize("window", [None, 20])
def test_a_token_does_not_depend_on_its_chunk(dtype: torch.dtype, window: int | None) -> None:
    """The last of 20 tokens alone, and as part of chunks that need one and two tiles."""
    whole = make_case([(50, 20)], heads=4, kv_heads=1, size=16, block_size=16, dtype=dtype)
    expected = attend(whole, window)
    for count in (1, 3, 11):
        batch = replace(whole.batch, cu_q=torch.tensor([0, count], dtype=torch.int32), max_q=count)
        part = replace(whole, q_NHD=whole.q_NHD[-count:], batch=batch)
        assert torch.equal(attend(part, window), expected[-count:])


@DTYPES
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -1e30])
def test_what_lies_behind_a_context_never_matters(dtype: torch.dtype, junk: float) -> None:
    shape: dict[str, Any] = {"heads": 2, "kv_heads": 1, "size": 16, "block_size": 16}
    lengths = [(40, 1), (17, 3)]
    clean = make_case(lengths, **shape, dtype=dtype, junk=0.0)
    dirty = make_case(lengths, **shape, dtype=dtype, junk=junk)
    assert torch.equal(attend(clean, 30), attend(dirty, 30))


def test_an_empty_context_gives_zeros() -> None:
    case = make_case(
        [(4, 1), (9, 1)], heads=2, kv_heads=1, size=16, block_size=16, dtype=torch.float32
    )
    batch = replace(case.batch, kv_lens=torch.tensor([5, 0], dtype=torch.int32))
    out = attend(replace(case, batch=batch))
    assert torch.equal(out[0], attend(case)[0])
    assert not out[1].any()


def test_strided_queries_are_read_in_place() -> None:
    case = make_case(
        [(40, 1), (5, 6)], heads=4, kv_heads=2, size=16, block_size=16, dtype=torch.float32
    )
    fused = torch.randn(7, 100)
    q_NHD = fused[:, 20:84].unflatten(-1, (4, 16))
    q_NHD.copy_(case.q_NHD)
    assert torch.equal(attend(replace(case, q_NHD=q_NHD)), attend(case))
