"""Rotary positions and storing of keys and values, each by itself or in one pass.

Shape legend: N tokens, H query heads, K key/value heads, D head size, C positions, P pages,
T tokens per page; inside a kernel B heads of a block, E one half of a head.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from paceline_kernels.triton_ops.language import kernel

_BLOCK_HEADS = 8
"""Heads of a program: 8 heads of 128 numbers give each of 128 threads 8 of them."""


@kernel
def _rotate_half(
    x_BE: tl.tensor, cos_E: tl.tensor, sin_E: tl.tensor, other_BE: tl.tensor
) -> tl.tensor:
    """Return x * cos + other * sin, rounding to the type where the reference does."""
    dtype = x_BE.dtype
    cos_E, sin_E = cos_E.to(dtype).to(tl.float32), sin_E.to(dtype).to(tl.float32)
    a_BE = (x_BE.to(tl.float32) * cos_E[None, :]).to(dtype).to(tl.float32)
    b_BE = (other_BE.to(tl.float32) * sin_E[None, :]).to(dtype).to(tl.float32)
    return (a_BE + b_BE).to(dtype)


@kernel
def _rotate_block(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    table_ptr: tl.tensor,
    head_B: tl.tensor,
    stride_x: tl.tensor,
    stride_out: tl.tensor,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Rotate heads at x and store them at out; the table has cos, then sin, of one position."""
    HALF: tl.constexpr = HEAD // 2
    e_E = tl.arange(0, BLOCK_E)
    in_half_E = e_E < HALF
    loaded_BE = (head_B < HEADS)[:, None] & in_half_E[None, :]
    x_ptrs_BE = x_ptr + head_B[:, None] * stride_x + e_E[None, :]
    first_BE = tl.load(x_ptrs_BE, mask=loaded_BE, other=0.0)
    second_BE = tl.load(x_ptrs_BE + HALF, mask=loaded_BE, other=0.0)
    cos1_E = tl.load(table_ptr + e_E, mask=in_half_E, other=0.0)
    cos2_E = tl.load(table_ptr + HALF + e_E, mask=in_half_E, other=0.0)
    sin1_E = tl.load(table_ptr + HEAD + e_E, mask=in_half_E, other=0.0)
    sin2_E = tl.load(table_ptr + HEAD + HALF + e_E, mask=in_half_E, other=0.0)
    out_ptrs_BE = out_ptr + head_B[:, None] * stride_out + e_E[None, :]
    tl.store(out_ptrs_BE, _rotate_half(first_BE, cos1_E, -sin1_E, second_BE), mask=loaded_BE)
    tl.store(out_ptrs_BE + HALF, _rotate_half(second_BE, cos2_E, sin2_E, first_BE), mask=loaded_BE)


@kernel
def _copy_block(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    head_B: tl.tensor,
    stride_x: tl.tensor,
    stride_out: tl.tensor,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Copy heads."""
    d_D = tl.arange(0, BLOCK_D)
    copied_BD = (head_B < HEADS)[:, None] & (d_D < HEAD)[None, :]
    x_BD = tl.load(x_ptr + head_B[:, None] * stride_x + d_D[None, :], mask=copied_BD, other=0.0)
    tl.store(out_ptr + head_B[:, None] * stride_out + d_D[None, :], x_BD, mask=copied_BD)


@kernel
def _position_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    table_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    stride_qn: tl.tensor,
    stride_qh: tl.tensor,
    stride_kn: tl.tensor,
    stride_kh: tl.tensor,
    stride_vn: tl.tensor,
    stride_vh: tl.tensor,
    stride_page: tl.tensor,
    stride_v: tl.tensor,
    stride_head: tl.tensor,
    stride_slot: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTATES: tl.constexpr,
    WRITES: tl.constexpr,
) -> None:
    """Do a block of one token's query heads, or of its key and value heads."""
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_B - 1) // BLOCK_B
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if ROTATES:
        table_ptr += tl.load(positions_ptr + token).to(tl.int64) * (2 * HEAD)
    if block < KV_BLOCKS:
        head_B = block * BLOCK_B + tl.arange(0, BLOCK_B)
        k_ptr += token * stride_kn
        if WRITES:
            slot = tl.load(slots_ptr + token).to(tl.int64)
            kv_ptr += slot // PAGE * stride_page + slot % PAGE * stride_slot
            v_ptr += token * stride_vn
            _copy_block(
                v_ptr, kv_ptr + stride_v, head_B, stride_vh, stride_head, KV_HEADS, HEAD, BLOCK_D
            )
            if ROTATES:
                _rotate_block(
                    k_ptr,
                    kv_ptr,
                    table_ptr,
                    head_B,
                    stride_kh,
                    stride_head,
                    KV_HEADS,
                    HEAD,
                    BLOCK_D // 2,
                )
            else:
                _copy_block(k_ptr, kv_ptr, head_B, stride_kh, stride_head, KV_HEADS, HEAD, BLOCK_D)
        else:
            k_out_ptr += token * (KV_HEADS * HEAD)
            _rotate_block(
                k_ptr, k_out_ptr, table_ptr, head_B, stride_kh, HEAD, KV_HEADS, HEAD, BLOCK_D // 2
            )
    elif ROTATES:
        head_B = (block - KV_BLOCKS) * BLOCK_B + tl.arange(0, BLOCK_B)
        q_ptr += token * stride_qn
        q_out_ptr += token * (HEADS * HEAD)
        _rotate_block(
            q_ptr, q_out_ptr, table_ptr, head_B, stride_qh, HEAD, HEADS, HEAD, BLOCK_D // 2
        )


def rotary(
    q_NHD: torch.Tensor, k_NKD: torch.Tensor, cos_sin_C2D: torch.Tensor, positions_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by position, halves paired (Su et al. 2021; GPT-NeoX layout)."""
    q_out_NHD = torch.empty(q_NHD.shape, dtype=q_NHD.dtype, device=q_NHD.device)
    k_out_NKD = torch.empty(k_NKD.shape, dtype=k_NKD.dtype, device=k_NKD.device)
    _launch(q_NHD, k_NKD, None, q_out_NHD, k_out_NKD, None, cos_sin_C2D, positions_N, None)
    return q_out_NHD, k_out_NKD


def write_kv(
    k_NKD: torch.Tensor, v_NKD: torch.Tensor, kv_P2KTD: torch.Tensor, slots_N: torch.Tensor
) -> None:
    """Store keys and values at slots (page * T + offset)."""
    _launch(None, k_NKD, v_NKD, None, None, kv_P2KTD, None, None, slots_N)


def rotary_write_kv(
    q_NHD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    cos_sin_C2D: torch.Tensor,
    positions_N: torch.Tensor,
    kv_P2KTD: torch.Tensor,
    slots_N: torch.Tensor,
) -> torch.Tensor:
    """Store rotated keys, and values, at slots and return rotated queries, [N, H, D].

    The bits are those of `rotary` and `write_kv`; the keys cross memory once less each way.
    """
    q_out_NHD = torch.empty(q_NHD.shape, dtype=q_NHD.dtype, device=q_NHD.device)
    _launch(q_NHD, k_NKD, v_NKD, q_out_NHD, None, kv_P2KTD, cos_sin_C2D, positions_N, slots_N)
    return q_out_NHD


def _launch(
    q_NHD: torch.Tensor | None,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor | None,
    q_out_NHD: torch.Tensor | None,
    k_out_NKD: torch.Tensor | None,
    kv_P2KTD: torch.Tensor | None,
    cos_sin_C2D: torch.Tensor | None,
    positions_N: torch.Tensor | None,
    slots_N: torch.Tensor | None,
) -> None:
    num_tokens, kv_heads, size = k_NKD.shape
    if num_tokens == 0:
        return
    num_heads = 0 if q_NHD is None else q_NHD.shape[1]
    for x in (q_NHD, k_NKD, v_NKD, kv_P2KTD):
        assert x is None or x.stride(-1) == 1, "a head's numbers must lie together"
    assert cos_sin_C2D is None or cos_sin_C2D.is_contiguous(), "the table is read by rows"
    page_strides = (0, 0, 0, 0) if kv_P2KTD is None else kv_P2KTD.stride()[:4]
    num_blocks = triton.cdiv(kv_heads, _BLOCK_HEADS) + triton.cdiv(num_heads, _BLOCK_HEADS)
    _position_kernel[(num_tokens, num_blocks)](
        q_NHD,
        k_NKD,
        v_NKD,
        q_out_NHD,
        k_out_NKD,
        kv_P2KTD,
        cos_sin_C2D,
        positions_N,
        slots_N,
        *((0, 0) if q_NHD is None else q_NHD.stride()[:2]),
        *k_NKD.stride()[:2],
        *((0, 0) if v_NKD is None else v_NKD.stride()[:2]),
        *page_strides,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEAD=size,
        PAGE=1 if kv_P2KTD is None else kv_P2KTD.shape[3],
        BLOCK_B=_BLOCK_HEADS,
        BLOCK_D=max(triton.next_power_of_2(size), 2),
        ROTATES=positions_N is not None,
        WRITES=slots_N is not None,
        num_warps=4,
    )
