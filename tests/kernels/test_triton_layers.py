"""Triton's element-wise operations, interpreted, against the reference, mostly bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline_kernels import rms_norm, rotary, silu_mul, write_kv
from tests.kernels.triton_interpreter import examples, triton_ops, uses_interpreter

__all__ = ["uses_interpreter"]

FEW = examples(10)
TYPES = st.sampled_from([torch.float32, torch.bfloat16])
ULP = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
"""One rounding: sums of squares, and exp, differ in their last float32 bits."""


@FEW
@given(
    shape=st.sampled_from([(1,), (7,), (3, 4)]),
    size=st.sampled_from([1, 64, 80, 700]),
    dtype=TYPES,
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_rms_norm(shape: tuple[int, ...], size: int, dtype: torch.dtype, scale: float) -> None:
    # A strided view, as queries in a fused projection are.
    x = (torch.randn(*shape, size + 5) * scale).to(dtype)[..., 5:]
    weight = torch.randn(size).to(dtype)
    ours = triton_ops.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(ours, rms_norm(x, weight, 1e-5), rtol=ULP[dtype], atol=0)


@FEW
@given(rows=st.integers(0, 5), size=st.sampled_from([1, 80, 700]), dtype=TYPES)
def test_add_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    x, added = torch.randn(2, rows, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    total, normed = triton_ops.add_rms_norm(x, added, weight, 1e-5)
    assert torch.equal(total, x + added)
    torch.testing.assert_close(
        normed, rms_norm(x + added, weight, 1e-5), rtol=ULP[dtype], atol=1e-30
    )


@FEW
@given(rows=st.integers(0, 4), size=st.sampled_from([1, 80, 1500]), dtype=TYPES)
def test_silu_mul(rows: int, size: int, dtype: torch.dtype) -> None:
    x = (torch.randn(rows, 2 * size) * 30).to(dtype)
    torch.testing.assert_close(triton_ops.silu_mul(x), silu_mul(x), rtol=2 * ULP[dtype], atol=1e-30)


@FEW
@given(
    tokens=st.integers(0, 4),
    heads=st.sampled_from([(1, 1), (6, 2), (12, 9)]),
    size=st.sampled_from([2, 64, 80, 96]),
    block_size=st.sampled_from([1, 4, 16]),
    dtype=TYPES,
    seed=st.integers(0, 9),
)
def test_positions_and_storing(
    tokens: int,
    heads: tuple[int, int],
    size: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    num_heads, kv_heads = heads
    widths = [num_heads * size, kv_heads * size, kv_heads * size]
    q, k, v = (
        part.unflatten(-1, (-1, size))
        for part in torch.randn(tokens, sum(widths)).to(dtype).split(widths, dim=-1)
    )
    table, positions = torch.randn(1000, 2, size), torch.randint(0, 1000, (tokens,))
    slots = torch.randperm(6 * block_size)[:tokens]
    pool = torch.randn(6, 3, 2, kv_heads, block_size, size).to(dtype)

    q_plain, k_plain = rotary(q, k, table, positions)
    q_ours, k_ours = triton_ops.rotary(q, k, table, positions)
    assert torch.equal(q_ours, q_plain)
    assert torch.equal(k_ours, k_plain)

    plain, apart, fused = pool.clone(), pool.clone(), pool.clone()
    write_kv(k_plain, v, plain[:, 1], slots[:tokens])
    triton_ops.write_kv(k_plain, v, apart[:, 1], slots)
    q_fused = triton_ops.rotary_write_kv(q, k, v, table, positions, fused[:, 1], slots)
    assert torch.equal(q_fused, q_plain)
    # Nothing but the slots changes.
    assert torch.equal(apart, plain)
    assert torch.equal(fused, plain)


@pytest.mark.parametrize("size", [64, 700])
def test_what_is_not_finite_stays_in_its_row(size: int) -> None:
    x = torch.randn(3, size)
    x[1, 3] = float("nan")
    ours = triton_ops.rms_norm(x, torch.ones(size), 1e-5)
    assert ours[1].isnan().all()
    assert ours[[0, 2]].isfinite().all()
