"""The kernels of paged attention; `attention.py` launches them and says what they promise.

Shape legend: D head size, M queries of a tile (tokens times the heads that share a key/value
head), C context positions of a block. A tile's queries lie token by token, heads inside.
Sums over a context are kept to the largest score so far (Milakov and Gimelshein 2018).
"""

from __future__ import annotations

import triton.language as tl  # type: ignore[import-untyped]

from paceline_kernels.triton_ops.language import kernel

TILE_FIELDS = 8
"""Numbers of a tile in a launch's table, see `_read_tile`."""


@kernel
def _read_tile(
    tiles_ptr: tl.tensor, tile: tl.tensor, IS_DECODE: tl.constexpr, FIELDS: tl.constexpr
) -> tl.tensor:
    """Return a tile's row, first token, first query, q_len, slot of its parts, and its tree.

    A tree is the length of the row's tail, 0 without one, and where its depths and mask start.
    """
    if IS_DECODE:
        zero = tile * 0
        return tile, tile, zero, zero + 1, tile, zero, zero, zero
    else:
        at = tiles_ptr + tile * FIELDS
        return (
            tl.load(at),
            tl.load(at + 1),
            tl.load(at + 2),
            tl.load(at + 3),
            tl.load(at + 4),
            tl.load(at + 5),
            tl.load(at + 6),
            tl.load(at + 7),
        )


@kernel
def _context_range(
    kv_len: tl.tensor,
    q_len: tl.tensor,
    first_query: tl.tensor,
    tail: tl.tensor,
    window: tl.tensor,
    QUERIES: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> tl.tensor:
    """Return [start, end) of the positions that any query of a tile sees."""
    before = kv_len - q_len
    start = before * 0
    if HAS_WINDOW:
        if HAS_TREE:
            start = tl.maximum(kv_len - tl.maximum(q_len, tail) - window + 1, 0)
        else:
            start = tl.maximum(before + first_query - window + 1, 0)
    end = kv_len
    if not HAS_TREE:
        end = tl.minimum(kv_len, before + first_query + QUERIES)
    return start, end


@kernel
def _fold(
    max_M: tl.tensor,
    sum_M: tl.tensor,
    acc_MD: tl.tensor,
    part_max_M: tl.tensor,
    part_sum_M: tl.tensor,
    part_acc_MD: tl.tensor,
) -> tl.tensor:
    """Add a part to those before it.

    Products are fused by hand: left to the compiler, two kernels may choose differently.
    """
    new_max_M = tl.maximum(max_M, part_max_M)
    base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
    old_M = tl.exp2(max_M - base_M)
    part_M = tl.exp2(part_max_M - base_M)
    sum_M = tl.fma(sum_M, old_M, part_sum_M * part_M)
    acc_MD = tl.fma(acc_MD, old_M[:, None], part_acc_MD * part_M[:, None])
    return new_max_M, sum_M, acc_MD


@kernel
def attention_kernel(
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    out_ptr: tl.tensor,
    part_acc_ptr: tl.tensor,
    part_stat_ptr: tl.tensor,
    kv_lens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    depth_ptr: tl.tensor,
    scale_log2: tl.tensor,
    window: tl.tensor,
    num_parts: tl.tensor,
    stride_qn: tl.tensor,
    stride_qh: tl.tensor,
    stride_page: tl.tensor,
    stride_v: tl.tensor,
    stride_head: tl.tensor,
    stride_slot: tl.tensor,
    stride_table: tl.tensor,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLIT: tl.constexpr,
    FIELDS: tl.constexpr,
    IS_DECODE: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    TO_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Attend a tile of queries of one row and one key/value head to every n-th part."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    row, first, first_query, q_len, slot, tail, depth_start, mask_start = _read_tile(
        tiles_ptr, tl.program_id(0), IS_DECODE, FIELDS
    )
    kv_len = tl.load(kv_lens_ptr + row)
    before = kv_len - q_len
    tail_at = kv_len - tail
    start, end = _context_range(
        kv_len, q_len, first_query, tail, window, QUERIES, HAS_TREE, HAS_WINDOW
    )

    at_M = tl.arange(0, BLOCK_M)
    query_M = first_query + at_M // GROUP
    head_M = kv_head * GROUP + at_M % GROUP
    is_query_M = (at_M < QUERIES * GROUP) & (query_M < q_len)
    d_D = tl.arange(0, BLOCK_D)
    in_head_D = d_D < HEAD
    q_at_M = (first + query_M).to(tl.int64) * stride_qn + head_M * stride_qh
    q_MD = tl.load(
        q_ptr + q_at_M[:, None] + d_D[None, :],
        mask=is_query_M[:, None] & in_head_D[None, :],
        other=0.0,
    )
    position_M = before + query_M
    if HAS_TREE:
        depth_M = tl.load(
            depth_ptr + depth_start + tail - q_len + query_M,
            mask=is_query_M & (tail > 0),
            other=0,
        )
        position_M = tl.where(tail > 0, tail_at + depth_M, position_M)

    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_part = start // SPLIT
    for part in range(first_part + tl.program_id(2), tl.cdiv(end, SPLIT), tl.num_programs(2)):
        part_max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
        part_sum_M = tl.zeros([BLOCK_M], tl.float32)
        part_acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        # Blocks lie at multiples of their size, also where a window opens inside of one.
        block_from = tl.maximum(part * SPLIT, start // BLOCK_C * BLOCK_C)
        for block in range(block_from, tl.minimum((part + 1) * SPLIT, end), BLOCK_C):
            c_C = block + tl.arange(0, BLOCK_C)
            in_context_C = c_C < end
            page_C = tl.load(
                tables_ptr + row * stride_table + c_C // PAGE, mask=in_context_C, other=0
            )
            kv_at_C = page_C.to(tl.int64) * stride_page + (c_C % PAGE) * stride_slot
            kv_ptrs_CD = kv_ptr + kv_head * stride_head + kv_at_C[:, None] + d_D[None, :]
            # What lies behind a context may be NaN, which no mask on scores keeps out of a sum.
            loaded_CD = in_context_C[:, None] & in_head_D[None, :]
            k_CD = tl.load(kv_ptrs_CD, mask=loaded_CD, other=0.0)
            scores_MC = tl.dot(q_MD, tl.trans(k_CD), input_precision=PRECISION)

            seen_MC = in_context_C[None, :] & is_query_M[:, None]
            if HAS_TREE:
                node_C = c_C - tail_at
                is_node_C = in_context_C & (node_C >= 0)
                depth_C = tl.load(depth_ptr + depth_start + node_C, mask=is_node_C, other=0)
                c_C = tl.where(is_node_C, tail_at + depth_C, c_C)
                sees_MC = tl.load(
                    mask_ptr + mask_start + (query_M * tail)[:, None] + node_C[None, :],
                    mask=is_query_M[:, None] & is_node_C[None, :],
                    other=1,
                )
                seen_MC = seen_MC & (sees_MC != 0)
            seen_MC = seen_MC & (c_C[None, :] <= position_M[:, None])
            if HAS_WINDOW:
                seen_MC = seen_MC & (c_C[None, :] > position_M[:, None] - window)

            scores_MC = tl.where(seen_MC, scores_MC * scale_log2, float("-inf"))
            new_max_M = tl.maximum(part_max_M, tl.max(scores_MC, axis=1))
            base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
            p_MC = tl.exp2(scores_MC - base_M[:, None])
            old_M = tl.exp2(part_max_M - base_M)
            part_sum_M = tl.fma(part_sum_M, old_M, tl.sum(p_MC, axis=1))
            part_max_M = new_max_M
            v_CD = tl.load(kv_ptrs_CD + stride_v, mask=loaded_CD, other=0.0)
            part_acc_MD = tl.dot(
                p_MC.to(v_CD.dtype), v_CD, part_acc_MD * old_M[:, None], input_precision=PRECISION
            )
        if TO_PARTS:
            part_at_M = (slot + query_M).to(tl.int64) * (KV_HEADS * GROUP) + head_M
            part_at_M = part_at_M * num_parts + (part - first_part)
            tl.store(part_stat_ptr + part_at_M * 2, part_max_M, mask=is_query_M)
            tl.store(part_stat_ptr + part_at_M * 2 + 1, part_sum_M, mask=is_query_M)
            tl.store(
                part_acc_ptr + part_at_M[:, None] * BLOCK_D + d_D[None, :],
                part_acc_MD,
                mask=is_query_M[:, None],
            )
        else:
            max_M, sum_M, acc_MD = _fold(max_M, sum_M, acc_MD, part_max_M, part_sum_M, part_acc_MD)
    if not TO_PARTS:
        # Nothing seen, as in the padded rows of a captured step, gives zero.
        out_MD = acc_MD / tl.where(sum_M == 0.0, 1.0, sum_M)[:, None]
        out_at_M = ((first + query_M).to(tl.int64) * (KV_HEADS * GROUP) + head_M) * HEAD
        tl.store(
            out_ptr + out_at_M[:, None] + d_D[None, :],
            out_MD.to(out_ptr.dtype.element_ty),
            mask=is_query_M[:, None] & in_head_D[None, :],
        )


@kernel
def fold_parts_kernel(
    out_ptr: tl.tensor,
    part_acc_ptr: tl.tensor,
    part_stat_ptr: tl.tensor,
    kv_lens_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    window: tl.tensor,
    num_parts: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    QUERIES: tl.constexpr,
    FIELDS: tl.constexpr,
    IS_DECODE: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    """Fold the parts of one token and head."""
    query = tl.program_id(1)
    row, first, first_query, q_len, slot, tail, _depth_start, _mask_start = _read_tile(
        tiles_ptr, tl.program_id(0), IS_DECODE, FIELDS
    )
    if query < q_len:
        kv_len = tl.load(kv_lens_ptr + row)
        start, end = _context_range(
            kv_len, q_len, first_query, tail, window, QUERIES, HAS_TREE, HAS_WINDOW
        )
        d_D = tl.arange(0, BLOCK_D)
        one = tl.arange(0, 1)
        max_1 = tl.full([1], float("-inf"), tl.float32)
        sum_1 = tl.zeros([1], tl.float32)
        acc_1D = tl.zeros([1, BLOCK_D], tl.float32)
        part_at = ((slot + query).to(tl.int64) * NUM_HEADS + tl.program_id(2)) * num_parts
        # Loads of four parts are under way at once: a fold is bound by their latency.
        for part in tl.range(0, tl.cdiv(end, SPLIT) - start // SPLIT, loop_unroll_factor=4):
            stat_ptrs_1 = part_stat_ptr + (part_at + part) * 2 + one
            part_acc_1D = tl.load(
                part_acc_ptr + (part_at + part) * BLOCK_D + one[:, None] + d_D[None, :]
            )
            max_1, sum_1, acc_1D = _fold(
                max_1, sum_1, acc_1D, tl.load(stat_ptrs_1), tl.load(stat_ptrs_1 + 1), part_acc_1D
            )
        out_1D = acc_1D / tl.where(sum_1 == 0.0, 1.0, sum_1)[:, None]
        out_at = ((first + query).to(tl.int64) * NUM_HEADS + tl.program_id(2)) * HEAD
        tl.store(
            out_ptr + out_at + one[:, None] + d_D[None, :],
            out_1D.to(out_ptr.dtype.element_ty),
            mask=(d_D < HEAD)[None, :],
        )
