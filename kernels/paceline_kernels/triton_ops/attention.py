"""Paged attention: decode rows, chunks of prompts and trees through one kernel.

Shape legend: N tokens of the step, R rows, P pages, T tokens per page, B table entries,
H query heads, K key/value heads, D head size.

A context is cut at fixed positions, and each part is reduced by itself, block by block:

    context  [0 ........ SPLIT_TOKENS)[SPLIT_TOKENS .. 2*SPLIT_TOKENS)[... kv_len)
              block block block ...

The parts are then folded in ascending order (Dao et al. 2023, "Flash-Decoding"). One program
may do all parts of a row, or one program each with a second kernel that folds: the arithmetic is
the same, so which of them runs is a matter of speed only, and a token's result depends on
neither its batch nor the chunk it came in.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import e, log2
from typing import Any

import torch
import triton  # type: ignore[import-untyped]

from paceline_kernels.reference import AttentionBatch, tree_of
from paceline_kernels.triton_ops.attention_kernels import (
    TILE_FIELDS,
    attention_kernel,
    fold_parts_kernel,
)
from paceline_kernels.triton_ops.language import precision

SPLIT_TOKENS = 512
"""Context positions of a part: at 4k of context eight programs share a head, and what they
write for the fold is 1 % of what they read, with four query heads per key/value head."""

BLOCK_TOKENS = 64
"""Most context positions of a block; wide heads have fewer, see `_block_tokens`."""

TARGET_PROGRAMS = 512
"""Programs that fill a GPU, about four per multiprocessor; with more, parts are not spread."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of one launch."""

    table: torch.Tensor | None
    """[tiles, TILE_FIELDS] int32 on the device; None when row r is token r, alone."""
    num_tiles: int
    num_tokens: int
    max_q: int
    max_span: int
    """Most tokens between the first position that a query of a row is at and its context's end."""
    is_spread: bool
    """Parts may go to programs of their own: every row is one tile."""


def paged_attention(
    q_NHD: torch.Tensor,
    kv_P2KTD: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    *,
    window: int | None = None,
) -> torch.Tensor:
    """Attend each query to its row's context, causally or by its tail's tree.

    The reference's contract, with `cu_q` and trees on the CPU and the rest on the device; a row of
    context zero gives zeros. A batch of single tokens without trees copies nothing between CPU and
    device and does not read `cu_q`, so a captured step may hold it. Returns [N, H, D].
    """
    out_NHD = torch.empty(q_NHD.shape, dtype=q_NHD.dtype, device=q_NHD.device)
    if q_NHD.shape[0] == 0:
        return out_NHD
    if q_NHD.stride(-1) != 1:
        q_NHD = q_NHD.contiguous()
    assert kv_P2KTD.stride(-1) == 1, "a head's numbers must lie together"
    group = q_NHD.shape[1] // kv_P2KTD.shape[2]
    block_m = max(_queries_of_tile(q_NHD.dtype), triton.next_power_of_2(group))
    num_rows = batch.kv_lens.shape[0]
    trees = None
    if batch.max_q == 1 and q_NHD.shape[0] == num_rows and batch.cu_tree is None:
        launches = [_Tiles(None, num_rows, num_rows, 1, 1, is_spread=True)]
    else:
        if batch.cu_tree is not None:
            trees = _lay_out_trees(batch, q_NHD.device)
        launches = _cut_rows(batch, trees, block_m // group, q_NHD.device)
    for tiles in launches:
        _attend(q_NHD, kv_P2KTD, batch, tiles, out_NHD, scale, window, trees, block_m)
    return out_NHD


def _queries_of_tile(dtype: torch.dtype) -> int:
    """Return M: one size for decode and prefill, so that both use the same instructions.

    64 is the smallest that Hopper's warp groups multiply. A decode row fills a part of it, and
    still reads memory slower than it multiplies: 64 multiply-adds per 2-byte number need a fifth
    of an H100 at full bandwidth. float32 has no matrix unit to fill.
    """
    return 16 if dtype == torch.float32 else 64


def _block_tokens(block_d: int, dtype: torch.dtype) -> int:
    """Return C, a power of two that divides a part: at most 16 KiB of keys in a block.

    Two blocks of keys and values under way then take 64 KiB, and with the queries fit the 99 KiB
    of small GPUs.
    """
    return max(16, min(BLOCK_TOKENS, (16 << 10) // (block_d * dtype.itemsize)))


@dataclass(frozen=True, slots=True)
class _Trees:
    """The trees of a batch."""

    depths: torch.Tensor
    """Flat int32 on the device: depth of each token of each tail."""
    masks: torch.Tensor
    """Flat uint8 on the device, [q_len, tail] per row: which of its tail a query sees."""
    rows: list[tuple[int, int, int]]
    """Length of a row's tail, where its depths start, and where its mask does."""


def _lay_out_trees(batch: AttentionBatch, device: torch.device) -> _Trees:
    depths, masks, rows = [], [], []
    depth_start = mask_start = 0
    for row, (first, last) in enumerate(pairwise(batch.cu_q.tolist())):
        depth_T, seen_TT = tree_of(batch.tail(row))
        seen_QT = seen_TT[-(last - first) :]
        rows.append((len(depth_T), depth_start, mask_start))
        depths.append(depth_T)
        masks.append(seen_QT.flatten())
        depth_start += depth_T.numel()
        mask_start += seen_QT.numel()
    return _Trees(torch.cat(depths).int().to(device), torch.cat(masks).byte().to(device), rows)


def _cut_rows(
    batch: AttentionBatch, trees: _Trees | None, queries: int, device: torch.device
) -> list[_Tiles]:
    """Cut rows into tiles of queries; rows of one tile apart from longer ones."""
    short: list[tuple[int, ...]] = []
    long: list[tuple[int, ...]] = []
    slot = max_short = max_span = 0
    starts = batch.cu_q.tolist()
    for row, (first, last) in enumerate(pairwise(starts)):
        q_len = last - first
        tree = trees.rows[row] if trees else (0, 0, 0)
        max_span = max(max_span, q_len, tree[0])
        if q_len > queries:
            long += ((row, first, at, q_len, 0, *tree) for at in range(0, q_len, queries))
        elif q_len > 0:
            short.append((row, first, 0, q_len, slot, *tree))
            slot += q_len
            max_short = max(max_short, q_len)
    launches = []
    for fields, tokens, max_q, is_spread in (
        (short, slot, max_short, True),
        (long, starts[-1] - slot, batch.max_q, False),
    ):
        if fields:
            table = torch.tensor(fields, dtype=torch.int32).to(device, non_blocking=True)
            launches.append(_Tiles(table, len(fields), tokens, max_q, max_span, is_spread))
    return launches


def _attend(
    q_NHD: torch.Tensor,
    kv_P2KTD: torch.Tensor,
    batch: AttentionBatch,
    tiles: _Tiles,
    out_NHD: torch.Tensor,
    scale: float,
    window: int | None,
    trees: _Trees | None,
    block_m: int,
) -> None:
    """Launch the kernel for the tiles, and the fold where parts are spread."""
    num_heads, size = q_NHD.shape[1:]
    kv_heads, block_size = kv_P2KTD.shape[2:4]
    group = num_heads // kv_heads
    # The table's width bounds the contexts: their lengths are on the device.
    num_parts = triton.cdiv(batch.block_tables.shape[1] * block_size, SPLIT_TOKENS)
    if window is not None:
        num_parts = min(num_parts, (window + tiles.max_span - 2) // SPLIT_TOKENS + 2)
    lanes = 1
    if tiles.is_spread:
        lanes = min(num_parts, triton.cdiv(TARGET_PROGRAMS, tiles.num_tiles * kv_heads))
    block_d = max(triton.next_power_of_2(size), 16)
    part_acc = part_stats = None
    if lanes > 1:
        shape = (tiles.num_tokens, num_heads, num_parts)
        part_acc = torch.empty(*shape, block_d, dtype=torch.float32, device=q_NHD.device)
        part_stats = torch.empty(*shape, 2, dtype=torch.float32, device=q_NHD.device)
    same: dict[str, Any] = {
        "window": 0 if window is None else window,
        "num_parts": num_parts,
        "HEAD": size,
        "BLOCK_D": block_d,
        "SPLIT": SPLIT_TOKENS,
        "FIELDS": TILE_FIELDS,
        "IS_DECODE": tiles.table is None,
        "HAS_TREE": trees is not None,
        "HAS_WINDOW": window is not None,
    }
    attention_kernel[(tiles.num_tiles, kv_heads, lanes)](
        q_NHD,
        kv_P2KTD,
        out_NHD,
        part_acc,
        part_stats,
        batch.kv_lens,
        batch.block_tables,
        tiles.table,
        None if trees is None else trees.masks,
        None if trees is None else trees.depths,
        scale_log2=scale * log2(e),
        stride_qn=q_NHD.stride(0),
        stride_qh=q_NHD.stride(1),
        stride_page=kv_P2KTD.stride(0),
        stride_v=kv_P2KTD.stride(1),
        stride_head=kv_P2KTD.stride(2),
        stride_slot=kv_P2KTD.stride(3),
        stride_table=batch.block_tables.stride(0),
        PAGE=block_size,
        KV_HEADS=kv_heads,
        GROUP=group,
        BLOCK_M=block_m,
        BLOCK_C=_block_tokens(block_d, q_NHD.dtype),
        TO_PARTS=lanes > 1,
        num_warps=4 if block_d < 128 else 8,
        num_stages=2,
        **same,
        PRECISION=precision(q_NHD.dtype),
    )
    if lanes > 1:
        fold_parts_kernel[(tiles.num_tiles, tiles.max_q, num_heads)](
            out_NHD,
            part_acc,
            part_stats,
            batch.kv_lens,
            tiles.table,
            NUM_HEADS=num_heads,
            QUERIES=block_m // group,
            num_warps=1,
            **same,
        )
