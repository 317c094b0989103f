"""Products with a weight, in f32, bf16 or int8, plain or gated: one kernel and its tiles.

Shape legend: N rows of activations, K inputs, O outputs; a tile is [O, N].

The weight is the first factor of the product and the activations the second, transposed. So the
side whose length decides which matrix instruction is used is always BLOCK_OUT outputs, and the
number of rows only changes how many columns there are. With the inputs summed in one loop of
fixed steps, never cut between programs, a row's result is the same alone and among thousands.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from paceline_kernels.triton_ops.language import kernel, precision

BLOCK_OUT = 64
"""Outputs of a tile: the one height of Hopper's warp group products. A layer of 4096 outputs
gives 64 programs, each with several steps of loads under way."""

BLOCK_IN = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64, torch.int8: 128}
"""Inputs of a step by operand type: 128 bytes, a cache line, of each row and output."""


@kernel
def _linear_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_out: tl.tensor,
    num_in: tl.tensor,
    stride_x: tl.tensor,
    stride_weight: tl.tensor,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_INT8: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Compute one tile of outputs; gated, the weight has as many outputs again behind them."""
    # Programs that share a tile of the weight run side by side, so memory gives it once.
    num_row_tiles = tl.cdiv(num_rows, BLOCK_N)
    o_O = tl.program_id(0) // num_row_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    n_N = tl.program_id(0) % num_row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    is_out_O, is_row_N = o_O < num_out, n_N < num_rows
    k_K = tl.arange(0, BLOCK_K)
    weight_ptrs_OK = weight_ptr + o_O.to(tl.int64)[:, None] * stride_weight + k_K[None, :]
    x_ptrs_NK = x_ptr + n_N.to(tl.int64)[:, None] * stride_x + k_K[None, :]
    second = num_out.to(tl.int64) * stride_weight

    acc_type: tl.constexpr = tl.int32 if IS_INT8 else tl.float32
    acc_ON = tl.zeros([BLOCK_O, BLOCK_N], acc_type)
    up_ON = tl.zeros([BLOCK_O, BLOCK_N], acc_type)
    for k in range(0, num_in, BLOCK_K):
        loaded_OK, loaded_NK = is_out_O[:, None], is_row_N[:, None]
        if not IS_EVEN:
            loaded_OK = loaded_OK & (k + k_K < num_in)[None, :]
            loaded_NK = loaded_NK & (k + k_K < num_in)[None, :]
        x_KN = tl.trans(tl.load(x_ptrs_NK + k, mask=loaded_NK, other=0))
        weight_OK = tl.load(weight_ptrs_OK + k, mask=loaded_OK, other=0)
        acc_ON = tl.dot(weight_OK, x_KN, acc_ON, input_precision=PRECISION, out_dtype=acc_type)
        if IS_GATED:
            weight_OK = tl.load(weight_ptrs_OK + second + k, mask=loaded_OK, other=0)
            up_ON = tl.dot(weight_OK, x_KN, up_ON, input_precision=PRECISION, out_dtype=acc_type)

    if IS_INT8:
        x_scale_N = tl.load(x_scale_ptr + n_N, mask=is_row_N, other=0.0)
        scale_O = tl.load(weight_scale_ptr + o_O, mask=is_out_O, other=0.0)
        acc_ON = acc_ON.to(tl.float32) * x_scale_N[None, :] * scale_O[:, None]
        if IS_GATED:
            scale_O = tl.load(weight_scale_ptr + num_out + o_O, mask=is_out_O, other=0.0)
            up_ON = up_ON.to(tl.float32) * x_scale_N[None, :] * scale_O[:, None]
    if HAS_BIAS:
        acc_ON += tl.load(bias_ptr + o_O, mask=is_out_O, other=0.0).to(tl.float32)[:, None]
        if IS_GATED:
            bias_O = tl.load(bias_ptr + num_out + o_O, mask=is_out_O, other=0.0)
            up_ON += bias_O.to(tl.float32)[:, None]
    if IS_GATED:
        acc_ON = acc_ON / (1.0 + tl.exp(-acc_ON)) * up_ON
    tl.store(
        out_ptr + n_N.to(tl.int64)[None, :] * num_out + o_O[:, None],
        acc_ON.to(out_ptr.dtype.element_ty),
        mask=is_out_O[:, None] & is_row_N[None, :],
    )


def linear(
    x_ND: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply by a weight and add a bias; sums and bias in float32, rounded once."""
    return product(x_ND, weight_OD, bias_O, dtype=x_ND.dtype)


def product(
    x: torch.Tensor,
    weight_OD: torch.Tensor,
    bias_O: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    is_gated: bool = False,
) -> torch.Tensor:
    """Launch the kernel; `scales` are those of int8 rows and outputs, float32.

    Gated, the weight is [2I, D] and the result silu(x @ first half) * (x @ second half), [.., I].
    Leading dimensions of x are kept.
    """
    assert x.dtype == weight_OD.dtype and weight_OD.stride(1) == 1, "operands of one type, in rows"
    num_in = weight_OD.shape[1]
    num_out = weight_OD.shape[0] // (2 if is_gated else 1)
    x_ND = x.reshape(-1, num_in)
    if x_ND.stride(1) != 1:
        x_ND = x_ND.contiguous()
    num_rows = x_ND.shape[0]
    out = torch.empty(*x.shape[:-1], num_out, dtype=dtype, device=x.device)
    if num_rows == 0:
        return out
    tile = _tile(num_rows, x.dtype, is_gated)
    block_in = BLOCK_IN[x.dtype]
    grid = (triton.cdiv(num_rows, tile["BLOCK_N"]) * triton.cdiv(num_out, BLOCK_OUT),)
    x_scale_N, weight_scale_O = scales if scales is not None else (None, None)
    _linear_kernel[grid](
        x_ND,
        weight_OD,
        bias_O,
        x_scale_N,
        weight_scale_O,
        out,
        num_rows,
        num_out,
        num_in,
        x_ND.stride(0),
        weight_OD.stride(0),
        BLOCK_O=BLOCK_OUT,
        BLOCK_K=block_in,
        HAS_BIAS=bias_O is not None,
        IS_GATED=is_gated,
        IS_INT8=scales is not None,
        IS_EVEN=num_in % block_in == 0,
        **tile,
        PRECISION=precision(x.dtype),
    )
    return out


def _tile(num_rows: int, dtype: torch.dtype, is_gated: bool) -> dict[str, Any]:
    """Return the columns of a tile and how many steps of loads are under way.

    Few rows are bound by reading the weight, so they buy depth: six steps of 10 KiB in each
    program. Many rows are bound by the products, so they buy width: three steps of 24 KiB.
    Gated, a step has 8 KiB more; each choice fits the 99 KiB of small GPUs.
    """
    if num_rows <= 32:
        num_stages = 4 if is_gated else 6
        return {"BLOCK_N": 16 if num_rows <= 16 else 32, "num_warps": 4, "num_stages": num_stages}
    if num_rows <= 128 or dtype == torch.float32:
        return {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3 if is_gated else 4}
    return {"BLOCK_N": 128, "num_warps": 4, "num_stages": 3}
