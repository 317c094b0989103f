"""The gate of a feed-forward layer, by itself or fused with the product before it."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from paceline_kernels.triton_ops.int8 import quantize_rows
from paceline_kernels.triton_ops.language import kernel
from paceline_kernels.triton_ops.linear import product


@kernel
def _silu_mul_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, size: tl.tensor, stride_x: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Gate a block of one row, rounding to the type where the reference does."""
    row = tl.program_id(0).to(tl.int64)
    i_I = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_I = tl.load(x_ptr + row * stride_x + i_I, mask=i_I < size, other=0.0)
    up_I = tl.load(x_ptr + row * stride_x + size + i_I, mask=i_I < size, other=0.0)
    gate32_I = gate_I.to(tl.float32)
    gate32_I = (gate32_I / (1.0 + tl.exp(-gate32_I))).to(gate_I.dtype).to(tl.float32)
    out_I = (gate32_I * up_I.to(tl.float32)).to(gate_I.dtype)
    tl.store(out_ptr + row * size + i_I, out_I, mask=i_I < size)


def silu_mul(gate_up_N2I: torch.Tensor) -> torch.Tensor:
    """Gate the second half by silu of the first."""
    x_N2I = gate_up_N2I.reshape(-1, gate_up_N2I.shape[-1])
    if x_N2I.stride(1) != 1:
        x_N2I = x_N2I.contiguous()
    num_rows, size = x_N2I.shape[0], x_N2I.shape[1] // 2
    out = torch.empty(
        *gate_up_N2I.shape[:-1], size, dtype=gate_up_N2I.dtype, device=gate_up_N2I.device
    )
    if num_rows:
        grid = (num_rows, triton.cdiv(size, 1024))
        _silu_mul_kernel[grid](x_N2I, out, size, x_N2I.stride(0), BLOCK=1024)
    return out


def linear_silu_mul(
    x_ND: torch.Tensor, weight_2ID: torch.Tensor, bias_2I: torch.Tensor | None = None
) -> torch.Tensor:
    """Return silu(x @ gate) * (x @ up), [N, I]; the weight is gate over up, as in `silu_mul`.

    Both products stay in float32 up to the one rounding at the end (Shazeer 2020, SwiGLU).
    """
    return product(x_ND, weight_2ID, bias_2I, dtype=x_ND.dtype, is_gated=True)


def linear_silu_mul_int8(
    x_ND: torch.Tensor,
    weight_2ID: torch.Tensor,
    scale_2I: torch.Tensor,
    bias_2I: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `linear_silu_mul`, with an int8 weight and a float32 scale per output."""
    x_int8_ND, x_scale_N = quantize_rows(x_ND.reshape(-1, x_ND.shape[-1]))
    out_NI = product(
        x_int8_ND,
        weight_2ID,
        bias_2I,
        dtype=x_ND.dtype,
        scales=(x_scale_N, scale_2I),
        is_gated=True,
    )
    return out_NI.view(*x_ND.shape[:-1], -1)
