"""Plain torch implementation of the model's operations, the oracle of all faster ones.

Shape legend: N tokens of the step, R rows (sequences), C context, P pages, T tokens per page,
H query heads, K key/value heads, D head size, I intermediate size, O output features.
The KV pool of one layer is `kv_P2KTD`: K at index 0, V at index 1 of its second dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class AttentionBatch:
    """A variable-length batch over paged KV.

    Row r has queries [cu_q[r], cu_q[r+1]) and a context of kv_lens[r] tokens, its own included:

        context   [0 ........ kv_len - q_len | ... q_len tokens of this step]

    The last t tokens of a row's context, its tail, may form a tree (Miao et al. 2023, SpecInfer,
    section 4.2). What of it is older than the step lies in its slots already:

        context   [0 ........ kv_len - t | ... t - q_len ... | ... q_len tokens of this step]

    A query sees what is in front of the tail, its ancestors and itself. The position of a token
    of the tail is (kv_len - t) + its depth, 0 for those without a parent; windows count positions.
    """

    cu_q: torch.Tensor
    """[R+1] int32, on the CPU."""
    kv_lens: torch.Tensor
    """[R] int32."""
    block_tables: torch.Tensor
    """[R, B] int32 page numbers; entries behind the context are ignored."""
    block_size: int
    max_q: int
    cu_tree: torch.Tensor | None = None
    """[R+1] int32, on the CPU: t = cu_tree[r+1] - cu_tree[r] is 0 where the row is plainly causal,
    else q_len <= t <= kv_len. None: no row has a tree."""
    tree_parents: torch.Tensor | None = None
    """[cu_tree[R]] int32, on the CPU: index within the tail of a token's parent, which is less
    than its own, or -1 where it hangs under the last token in front of the tail."""

    def tail(self, row: int) -> list[int]:
        """Return the parents of a row's tail; empty where the row is plainly causal."""
        if self.cu_tree is None or self.tree_parents is None:
            return []
        begin, end = self.cu_tree[row : row + 2].tolist()
        parents: list[int] = self.tree_parents[begin:end].tolist()
        return parents


def tree_of(parents: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the depth of each token of a tail, [t], and whom it sees in it, bool [t, t]."""
    depth_T = torch.zeros(len(parents), dtype=torch.int64)
    seen_TT = torch.eye(len(parents), dtype=torch.bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            depth_T[token] = depth_T[parent] + 1
            seen_TT[token] |= seen_TT[parent]
    return depth_T, seen_TT


def rms_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise by the root mean square, in float32 (Zhang and Sennrich 2019, eq. 4)."""
    x32 = x_ND.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * x32.to(x_ND.dtype)


def rotary(
    q_NHD: torch.Tensor, k_NKD: torch.Tensor, cos_sin_C2D: torch.Tensor, positions_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by position, halves paired (Su et al. 2021; GPT-NeoX layout)."""
    cos_N1D, sin_N1D = cos_sin_C2D[positions_N].to(q_NHD.dtype).unsqueeze(2).unbind(1)
    return (
        q_NHD * cos_N1D + _rotate_half(q_NHD) * sin_N1D,
        k_NKD * cos_N1D + _rotate_half(k_NKD) * sin_N1D,
    )


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def write_kv(
    k_NKD: torch.Tensor, v_NKD: torch.Tensor, kv_P2KTD: torch.Tensor, slots_N: torch.Tensor
) -> None:
    """Store keys and values at slots (page * T + offset)."""
    block_size = kv_P2KTD.shape[3]
    pages_N, offsets_N = slots_N // block_size, slots_N % block_size
    kv_P2KTD[pages_N, 0, :, offsets_N] = k_NKD
    kv_P2KTD[pages_N, 1, :, offsets_N] = v_NKD


def move_kv(kv_PL2KTD: torch.Tensor, from_slots_N: torch.Tensor, to_slots_N: torch.Tensor) -> None:
    """Move the KV of some tokens, of all layers, to other slots (page * T + offset, int64).

    As if one after the other: no slot may be written that a later move reads, which holds for
    accepted tokens of a tree as they move forwards in ascending order.
    """
    block_size = kv_PL2KTD.shape[4]
    for source, target in zip(from_slots_N.tolist(), to_slots_N.tolist(), strict=True):
        if source != target:
            kv_PL2KTD[target // block_size, :, :, :, target % block_size] = kv_PL2KTD[
                source // block_size, :, :, :, source % block_size
            ]


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight in int8 with one scale per output: w = values * scales."""

    values_OD: torch.Tensor
    scales_O: torch.Tensor


def quantise_rows(x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring each row to int8, symmetric: x = values * scale, scale = max |x| / 127.

    Returns int8 [N, D] and float32 [N]. A row that is not finite has the scale NaN.
    """
    x32 = x_ND.float()
    bound_N1 = x32.abs().amax(dim=-1, keepdim=True)
    is_finite_N1 = x32.isfinite().all(dim=-1, keepdim=True)
    factor_N1 = torch.where(is_finite_N1 & (bound_N1 > 0), 127.0 / bound_N1, 0.0)
    values_ND = (x32 * factor_N1).nan_to_num(0.0).round().to(torch.int8)
    scale_N1 = torch.where(is_finite_N1, bound_N1 / 127.0, float("nan"))
    return values_ND, scale_N1[:, 0]


def quantise_weight(weight_OD: torch.Tensor) -> QuantisedWeight:
    """Bring a weight to int8, one scale per output."""
    return QuantisedWeight(*quantise_rows(weight_OD))


def linear(
    x_ND: torch.Tensor,
    weight_OD: torch.Tensor | QuantisedWeight,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by a weight and add a bias.

    A quantised weight is multiplied by activations that are quantised row by row (dynamic W8A8);
    sums are exact in int32.
    """
    if isinstance(weight_OD, torch.Tensor):
        return F.linear(x_ND, weight_OD, bias_O)
    values_ND, scales_N = quantise_rows(x_ND)
    sums_NO = values_ND.int() @ weight_OD.values_OD.t().int()
    y_NO = sums_NO.float() * scales_N[:, None] * weight_OD.scales_O
    return (y_NO if bias_O is None else y_NO + bias_O).to(x_ND.dtype)


def silu_mul(gate_up_N2I: torch.Tensor) -> torch.Tensor:
    """Gate the second half by silu of the first."""
    gate_NI, up_NI = gate_up_N2I.chunk(2, dim=-1)
    return F.silu(gate_NI) * up_NI


def paged_attention(
    q_NHD: torch.Tensor,
    kv_P2KTD: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    *,
    window: int | None = None,
) -> torch.Tensor:
    """Attend each query to its row's context, causally or by its tail's tree.

    With `window`, a query at position i sees positions [i - window + 1, i]. Pages may hold
    anything behind the context, NaN included. Returns [N, H, D].
    """
    out_NHD = torch.empty_like(q_NHD)
    starts = batch.cu_q.tolist()
    q_lens = [end - start for start, end in pairwise(starts)]
    tails = [batch.tail(r) for r in range(len(q_lens))]
    # Alone in its tail, a token is a token like any other.
    singles = [r for r, q_len in enumerate(q_lens) if q_len == 1 and len(tails[r]) <= 1]
    if singles:
        at = torch.tensor([starts[r] for r in singles])
        out_NHD[at] = _decode_rows(q_NHD[at], kv_P2KTD, batch, torch.tensor(singles), scale, window)
    for r in sorted(set(range(len(q_lens))) - set(singles)):
        rows = slice(starts[r], starts[r + 1])
        out_NHD[rows] = _long_row(q_NHD[rows], kv_P2KTD, batch, r, scale, window, tails[r])
    return out_NHD


def _decode_rows(
    q_RHD: torch.Tensor,
    kv_P2KTD: torch.Tensor,
    batch: AttentionBatch,
    rows_R: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Attend single queries together, contexts padded to the longest."""
    lens_R = batch.kv_lens[rows_R]
    num_blocks = -(-int(lens_R.max()) // batch.block_size)
    tables_RB = batch.block_tables[rows_R, :num_blocks].long()
    in_row_RB = torch.arange(num_blocks) * batch.block_size < lens_R[:, None]
    kv_RB2KTD = kv_P2KTD[torch.where(in_row_RB, tables_RB, 0)]
    at_C = torch.arange(num_blocks * batch.block_size)
    seen_RC = at_C < lens_R[:, None]
    if window is not None:
        seen_RC &= at_C >= lens_R[:, None] - window
    # What lies behind a context may be NaN, which no mask on scores keeps out of a sum.
    seen_RBT = seen_RC.unflatten(1, (num_blocks, batch.block_size))
    kv_RB2KTD.masked_fill_(~seen_RBT[:, :, None, None, :, None], 0)
    k_RKCD, v_RKCD = kv_RB2KTD.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).unbind(0)
    out = F.scaled_dot_product_attention(
        q_RHD.unsqueeze(2),
        k_RKCD,
        v_RKCD,
        attn_mask=seen_RC[:, None, None, :],
        scale=scale,
        enable_gqa=True,
    )
    return out.squeeze(2)


def _long_row(
    q_QHD: torch.Tensor,
    kv_P2KTD: torch.Tensor,
    batch: AttentionBatch,
    row: int,
    scale: float,
    window: int | None,
    tail: list[int],
) -> torch.Tensor:
    """Attend several queries of one row, or some of its tail, to its gathered context."""
    kv_len, q_len = int(batch.kv_lens[row]), q_QHD.shape[0]
    pages_B = batch.block_tables[row, : -(-kv_len // batch.block_size)].long()
    k_KCD, v_KCD = kv_P2KTD[pages_B].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :kv_len].unbind(0)
    num_before, tail_at = kv_len - q_len, kv_len - len(tail)
    at_C = torch.arange(kv_len)
    depth_T, seen_TT = tree_of(tail)
    at_C[tail_at:] = tail_at + depth_T
    at_Q = at_C[num_before:, None]
    seen_QC = at_C <= at_Q
    if tail:
        seen_QC[:, tail_at:] = seen_TT[-q_len:]
    if window is not None:
        seen_QC &= at_C > at_Q - window
    out_1HQD = F.scaled_dot_product_attention(
        q_QHD.transpose(0, 1)[None],
        k_KCD[None],
        v_KCD[None],
        attn_mask=seen_QC,
        scale=scale,
        enable_gqa=True,
    )
    return out_1HQD[0].transpose(0, 1)
