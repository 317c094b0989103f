"""The C++ operations against the reference and against torch's own attention.

$PACELINE_KERNELS chooses the instruction set; the last test runs the file with each of them.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_kernels import quantise_weight, reference
from paceline_kernels.cpu import library
from tests.kernels.test_attention import TOLERANCE, Case, make_case, random_tails
from tests.kernels.test_attention import reference as torch_attention

pytestmark = pytest.mark.skipif(
    library.library() is None, reason="the C++ kernels need a compiler at set-up"
)
if library.library() is not None:
    from paceline_kernels.cpu import ops

BACKENDS = ("portable", "avx2", "avx512", "amx")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def assert_attends(
    case: Case, window: int | None = None, tails: list[list[int]] | None = None
) -> None:
    scale = case.q_NHD.shape[-1] ** -0.5
    ours = ops.paged_attention(case.q_NHD, case.pool, case.batch, scale, window=window)
    tolerance = TOLERANCE[case.q_NHD.dtype]
    expected = torch_attention(case, window, tails)
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)
    apart = ops.paged_attention(
        case.q_NHD, case.pool, case.batch, scale, window=window, is_split=True
    )
    assert torch.equal(ours, apart)


@DTYPES
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_head_sizes_beyond_a_split(dtype: torch.dtype, size: int) -> None:
    lengths = [(600, 1), (250, 40), (0, 1), (255, 1), (256, 1)]
    case = make_case(lengths, heads=6, kv_heads=2, size=size, block_size=16, dtype=dtype)
    assert_attends(case)
    assert_attends(case, window=100)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 330), st.integers(1, 70)), min_size=1, max_size=4),
    group=st.sampled_from([1, 2, 3, 7, 20]),
    kv_heads=st.sampled_from([1, 2, 9]),
    size=st.sampled_from([2, 16, 24, 64]),
    block_size=st.sampled_from([1, 5, 8, 16, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.none() | st.integers(1, 300),
)
def test_any_batch(
    lengths: list[tuple[int, int]],
    group: int,
    kv_heads: int,
    size: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
) -> None:
    case = make_case(
        lengths,
        heads=group * kv_heads,
        kv_heads=kv_heads,
        size=size,
        block_size=block_size,
        dtype=dtype,
    )
    assert_attends(case, window)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 24)), min_size=1, max_size=3),
    group=st.sampled_from([1, 3, 4, 9]),
    kv_heads=st.sampled_from([1, 2, 9]),
    size=st.sampled_from([16, 24, 64]),
    block_size=st.sampled_from([1, 5, 16, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.none() | st.integers(1, 100),
    seed=st.integers(0, 1000),
)
def test_trees(
    lengths: list[tuple[int, int]],
    group: int,
    kv_heads: int,
    size: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
    seed: int,
) -> None:
    tails = random_tails(lengths, random.Random(seed))
    case = make_case(
        lengths,
        heads=group * kv_heads,
        kv_heads=kv_heads,
        size=size,
        block_size=block_size,
        dtype=dtype,
        tails=tails,
    )
    assert_attends(case, window, tails)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 80),
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 200),
    weight_type=st.sampled_from(["f32", "bf16", "int8"]),
    has_bias=st.booleans(),
)
def test_linear(rows: int, outputs: int, inputs: int, weight_type: str, has_bias: bool) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs) * inputs**-0.5
    bias = torch.randn(outputs) if has_bias else None
    ours = ops.PackedLinear(weight, bias, weight_type=weight_type)(x)
    if weight_type == "int8":
        expected = reference.linear(x, quantise_weight(weight), bias)
        # Rounding to int8 may go the other way where a value lies in the middle.
        torch.testing.assert_close(ours, expected, rtol=0, atol=3e-2)
        assert ((ours - expected).abs() < 1e-4).float().mean() > 0.9
        return
    if weight_type == "bf16":
        x, weight = x.bfloat16().float(), weight.bfloat16().float()
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_type", ["f32", "bf16", "int8"])
def test_a_product_of_a_row_does_not_depend_on_the_rows_beside_it(weight_type: str) -> None:
    x = torch.randn(600, 5000)
    linear = ops.PackedLinear(torch.randn(70, 5000), weight_type=weight_type)
    together = linear(x)
    for begin, end in [(0, 1), (1, 9), (9, 26), (26, 58), (58, 120), (120, 600)]:
        assert torch.equal(linear(x[begin:end]), together[begin:end])


@pytest.mark.parametrize("weight_type", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("inner", [1, 16, 40])
def test_gated_product(weight_type: str, inner: int) -> None:
    x, weight = torch.randn(5, 64), torch.randn(2 * inner, 64) / 8
    plain = ops.PackedLinear(weight, weight_type=weight_type)(x)
    ours = ops.PackedLinear(weight, weight_type=weight_type, is_gated=True)(x)
    torch.testing.assert_close(ours, reference.silu_mul(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_type", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so_and_spoils_no_other(
    weight_type: str, junk: float
) -> None:
    x, linear = torch.randn(20, 96), ops.PackedLinear(torch.randn(33, 96), weight_type=weight_type)
    sound = linear(x)
    x[7, 50] = junk
    spoiled = linear(x)
    assert not spoiled[7].isfinite().any()
    others = torch.arange(20) != 7
    assert torch.equal(spoiled[others], sound[others])


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), size=st.integers(1, 300))
def test_rms_norm(rows: int, size: int) -> None:
    x, weight = torch.randn(rows, size), torch.randn(size)
    ours = ops.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(ours, reference.rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [2, 30, 64, 80, 256])
def test_rotary(size: int) -> None:
    q, k = torch.randn(6, 4, size), torch.randn(6, 2, size)
    angles = torch.outer(torch.arange(50.0), torch.rand(size // 2)).repeat(1, 2)
    table = torch.stack((angles.cos(), angles.sin()), dim=1)
    positions = torch.tensor([0, 3, 49, 7, 7, 1])
    expected = reference.rotary(q, k, table, positions)
    for ours, other in zip(ops.rotary(q, k, table, positions), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    bool(os.environ.get(library.KERNELS_VARIABLE)), reason="this is one of the runs already"
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_instruction_set(backend: str) -> None:
    """A process has one; those that this machine cannot run are refused by name."""
    names = ("ops", "decoder", "trees")
    files = [f"tests/kernels/test_cpu_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, library.KERNELS_VARIABLE: backend}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    if "this machine cannot run it" in run.stdout + run.stderr:
        assert backend in ("avx512", "amx")
        return
    assert run.returncode == 0, run.stdout[-3000:]
