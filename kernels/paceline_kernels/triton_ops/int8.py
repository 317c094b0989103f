"""Products in int8: rows of activations are rounded as they come, weights once.

Symmetric, with one scale per row of activations and one per output of the weight (Dettmers et al.
2022, "LLM.int8()", section 2.1). Sums of products are int32 and exact, so no order matters.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from paceline_kernels.triton_ops.language import kernel
from paceline_kernels.triton_ops.linear import product


@kernel
def _quantize_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    size: tl.tensor,
    stride_x: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Round one row."""
    row = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, BLOCK)
    x_D = tl.load(x_ptr + row * stride_x + d_D, mask=d_D < size, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x_D), axis=0)
    scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, 127.0))
    # The maximum passes over NaN; what is not finite must not come out as a number.
    num_nan = tl.sum((x_D != x_D).to(tl.int32), axis=0)
    tl.store(scale_ptr + row, tl.where(num_nan > 0, float("nan"), scale))
    # Adding 1.5 * 2**23 leaves no bits below one, so float32's own rounding goes to even.
    rounded_D = tl.div_rn(x_D, tl.zeros_like(x_D) + scale) + 12582912.0 - 12582912.0
    rounded_D = tl.minimum(tl.maximum(rounded_D, -127.0), 127.0)
    tl.store(out_ptr + row * size + d_D, rounded_D.to(tl.int8), mask=d_D < size)


def quantize_rows(x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as int8 in [-127, 127] and their float32 scales, [N, D] and [N].

    A row of zeros has scale 1, a row with NaN or infinity a scale that is not finite. The rows
    of a weight are its outputs.
    """
    if x_ND.stride(1) != 1:
        x_ND = x_ND.contiguous()
    num_rows, size = x_ND.shape
    out_ND = torch.empty(num_rows, size, dtype=torch.int8, device=x_ND.device)
    scale_N = torch.empty(num_rows, dtype=torch.float32, device=x_ND.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        _quantize_kernel[(num_rows,)](
            x_ND, out_ND, scale_N, size, x_ND.stride(0), BLOCK=block, num_warps=8
        )
    return out_ND, scale_N


def linear_int8(
    x_ND: torch.Tensor,
    weight_OD: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by an int8 weight with a float32 scale per output and add a bias.

    Returns x's type. A row of x that is not finite gives a row that is NaN.
    """
    x_int8_ND, x_scale_N = quantize_rows(x_ND.reshape(-1, x_ND.shape[-1]))
    out_NO = product(x_int8_ND, weight_OD, bias_O, dtype=x_ND.dtype, scales=(x_scale_N, scale_O))
    return out_NO.view(*x_ND.shape[:-1], -1)
