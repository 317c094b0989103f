"""Root mean square norm, by itself or fused with the residual sum before it."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from paceline_kernels.triton_ops.language import kernel


@kernel
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    added_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    out_ptr: tl.tensor,
    eps: tl.tensor,
    size: tl.tensor,
    stride_xn: tl.tensor,
    stride_xh: tl.tensor,
    stride_added: tl.tensor,
    BLOCK: tl.constexpr,
    HAS_SUM: tl.constexpr,
) -> None:
    """Normalise one row, rounding to the type where the reference does."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d_D = tl.arange(0, BLOCK)
    in_row_D = d_D < size
    x_D = tl.load(x_ptr + row * stride_xn + head * stride_xh + d_D, mask=in_row_D, other=0.0)
    dtype = x_D.dtype
    x32_D = x_D.to(tl.float32)
    if HAS_SUM:
        added_D = tl.load(added_ptr + row * stride_added + d_D, mask=in_row_D, other=0.0)
        sum_D = (x32_D + added_D.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * size + d_D, sum_D, mask=in_row_D)
        x32_D = sum_D.to(tl.float32)
    mean = tl.sum(x32_D * x32_D, axis=0) / size
    normed_D = (x32_D * tl.rsqrt(mean + eps)).to(dtype).to(tl.float32)
    weight_D = tl.load(weight_ptr + d_D, mask=in_row_D, other=0.0).to(tl.float32)
    out_at = (row * tl.num_programs(1) + head) * size
    tl.store(out_ptr + out_at + d_D, (weight_D * normed_D).to(dtype), mask=in_row_D)


def rms_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise by the root mean square, in float32 (Zhang and Sennrich 2019, eq. 4)."""
    size = x_ND.shape[-1]
    out = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=x_ND.device)
    # Heads of a fused projection are a strided view, which is read in place.
    x_NHD = x_ND if x_ND.dim() == 3 else x_ND.reshape(-1, 1, size)
    _launch(x_NHD, None, weight_D, None, out, eps)
    return out


def add_rms_norm(
    x_ND: torch.Tensor, added_ND: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum, rounded to the type, and its norm: x + added, rms_norm(x + added)."""
    sum_ND = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=x_ND.device)
    out_ND = torch.empty_like(sum_ND)
    _launch(x_ND.unsqueeze(1), added_ND, weight_D, sum_ND, out_ND, eps)
    return sum_ND, out_ND


def _launch(
    x_NHD: torch.Tensor,
    added_ND: torch.Tensor | None,
    weight_D: torch.Tensor,
    sum_ND: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
) -> None:
    if x_NHD.stride(2) != 1:
        x_NHD = x_NHD.contiguous()
    if added_ND is not None and added_ND.stride(1) != 1:
        added_ND = added_ND.contiguous()
    num_rows, num_heads, size = x_NHD.shape
    if num_rows == 0:
        return
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(num_rows, num_heads)](
        x_NHD,
        added_ND,
        weight_D,
        sum_ND,
        out,
        eps,
        size,
        x_NHD.stride(0),
        x_NHD.stride(1),
        0 if added_ND is None else added_ND.stride(0),
        BLOCK=block,
        HAS_SUM=added_ND is not None,
        # 16 numbers per thread: their sum is a tree of a shape that only the size decides.
        num_warps=min(max(block // 512, 1), 16),
    )
