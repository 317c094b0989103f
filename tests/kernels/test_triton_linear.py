"""Triton's products, interpreted, against torch and the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from paceline_kernels import linear, silu_mul
from tests.kernels.triton_interpreter import examples, triton_ops, uses_interpreter

__all__ = ["uses_interpreter"]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
"""float32 sums in another order; bf16 is rounded once, by us and by torch."""

SHAPES = {
    "rows": st.sampled_from([1, 2, 17, 33, 130]),
    "num_in": st.sampled_from([1, 40, 64, 200]),
    "num_out": st.sampled_from([1, 64, 70]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "has_bias": st.booleans(),
}
FEW = examples(8)


def operands(
    rows: int, num_in: int, num_out: int, dtype: torch.dtype, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x = torch.randn(rows, num_in).to(dtype)
    weight = (torch.randn(num_out, num_in) / num_in**0.5).to(dtype)
    return x, weight, torch.randn(num_out).to(dtype) if has_bias else None


@FEW
@given(**SHAPES)
def test_linear(rows: int, num_in: int, num_out: int, dtype: torch.dtype, has_bias: bool) -> None:
    x, weight, bias = operands(rows, num_in, num_out, dtype, has_bias)
    ours = triton_ops.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = TOLERANCE[dtype]
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        ours, linear(x, weight, bias), rtol=2 * tolerance, atol=2 * tolerance
    )


@FEW
@given(**SHAPES)
def test_gated(rows: int, num_in: int, num_out: int, dtype: torch.dtype, has_bias: bool) -> None:
    x, weight, bias = operands(rows, num_in, 2 * num_out, dtype, has_bias)
    ours = triton_ops.linear_silu_mul(x, weight, bias)
    plain = silu_mul(linear(x.float(), weight.float(), None if bias is None else bias.float()))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(ours.float(), plain, rtol=tolerance, atol=tolerance)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows with torch."""
    largest = x.float().abs().amax(dim=-1)
    scale = torch.where(largest == 0, 1.0, largest / 127)
    return (x.float() / scale[..., None]).round().clamp(-127, 127), scale


@examples(5)
@given(**SHAPES)
def test_int8(rows: int, num_in: int, num_out: int, dtype: torch.dtype, has_bias: bool) -> None:
    x, weight, bias = operands(rows, num_in, 2 * num_out, dtype, has_bias)
    x[0] = 0
    x_int8, x_scale = quantized(x)
    w_int8, w_scale = quantized(weight)
    for tensor, expected in ((x, (x_int8, x_scale)), (weight, (w_int8, w_scale))):
        values, scale = triton_ops.quantize_rows(tensor)
        assert values.dtype == torch.int8
        assert torch.equal(values.float(), expected[0])
        assert torch.equal(scale, expected[1])
    sums = (x_int8.double() @ w_int8.double().T).float()
    plain = sums * x_scale[:, None] * w_scale
    if bias is not None:
        plain += bias.float()
    tolerance = TOLERANCE[dtype]
    weight_int8 = w_int8.to(torch.int8)
    ours = triton_ops.linear_int8(x, weight_int8, w_scale, bias)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), plain, rtol=tolerance, atol=tolerance)
    gated = triton_ops.linear_silu_mul_int8(x, weight_int8, w_scale, bias)
    torch.testing.assert_close(gated.float(), silu_mul(plain), rtol=tolerance, atol=tolerance)


@DTYPES
def test_int8_is_close_to_the_weight_it_rounds(dtype: torch.dtype) -> None:
    x, weight, _ = operands(40, 256, 64, dtype, has_bias=False)
    ours = triton_ops.linear_int8(x, *triton_ops.quantize_rows(weight))
    exact = linear(x.double(), weight.double())
    # Both factors are off by at most half a step of 1/127 of their row's largest number.
    assert (ours.double() - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_int8_hides_nothing_that_is_not_finite(bad: float) -> None:
    x, weight, _ = operands(3, 64, 64, torch.float32, has_bias=False)
    x[1, 5] = bad
    ours = triton_ops.linear_int8(x, *triton_ops.quantize_rows(weight))
    assert ours[1].isnan().all()
    assert ours[[0, 2]].isfinite().all()


@DTYPES
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    """Over all tiles: 16, 32, 64 and 128 rows."""
    x, weight, _ = operands(140, 200, 64, dtype, has_bias=False)
    int8, scale = triton_ops.quantize_rows(weight)
    operations: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: triton_ops.linear(x, weight),
        lambda x: triton_ops.linear_silu_mul(x, weight),
        lambda x: triton_ops.linear_int8(x, int8, scale),
    ]
    for operation in operations:
        whole = operation(x)
        for rows in (1, 20, 40):
            assert torch.equal(operation(x[-rows:]), whole[-rows:])


def test_leading_dimensions_and_strides() -> None:
    fused = torch.randn(2, 3, 90)
    x, weight = fused[..., 10:50], torch.randn(8, 40)
    for ours, plain in (
        (triton_ops.linear(x, weight), linear(x, weight)),
        (triton_ops.linear(x[0, :0], weight), linear(x[0, :0], weight)),
        (triton_ops.linear_silu_mul(x, weight), silu_mul(linear(x, weight))),
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert triton_ops.linear_int8(x, *triton_ops.quantize_rows(weight)).shape == (2, 3, 8)
