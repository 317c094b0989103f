"""Times the Triton operations against torch and a measured roofline; needs a CUDA device.

Run as `python benchmarks/triton_gpu.py`. Prints one JSON line per case, times in microseconds
with a cold L2 cache:

    ours_us      the operation of paceline_kernels.triton_ops
    torch_us     torch's own: SDPA over contiguous keys and values, matmul
    roofline_us  the larger of bytes over the measured copy bandwidth and operations over the
                 measured rate of a large matmul of the type
    error        largest difference to torch's result
    is_invariant the last row has the same bits alone and in the batch
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from paceline_kernels import AttentionBatch

BLOCK_SIZE = 16
HEADS, KV_HEADS, HEAD = 32, 8, 128
HIDDEN, INTERMEDIATE = 4096, 14336

Case = dict[str, Any]


def time_us(operation: Callable[[], object]) -> float:
    """Return the median time of an operation."""
    from triton.testing import do_bench  # type: ignore[import-untyped]

    return float(do_bench(operation, return_mode="median")) * 1e3


class Roofline:
    """What the device at hand reaches: bytes per second of a copy, operations of matmuls."""

    def __init__(self) -> None:
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        self.bytes_per_us = 2 * source.numel() / time_us(lambda: target.copy_(source))
        a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
        self.bf16_per_us = 2 * 8192**3 / time_us(lambda: a @ b)
        c, d = torch.randint(-127, 128, (2, 8192, 8192), device="cuda", dtype=torch.int8)
        self.int8_per_us = 2 * 8192**3 / time_us(lambda: torch._int_mm(c, d.T))

    def us(self, num_bytes: float, num_operations: float, *, is_int8: bool = False) -> float:
        """Return the least time for so many bytes and operations."""
        rate = self.int8_per_us if is_int8 else self.bf16_per_us
        return max(num_bytes / self.bytes_per_us, num_operations / rate)


def paged(rows: int, q_len: int, context: int) -> tuple[torch.Tensor, ...]:
    """Return queries, a pool, its block tables, and keys and values as [R, K, C, D]."""
    num_blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(rows * num_blocks, device="cuda").view(rows, num_blocks).int()
    shape = (rows * num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD)
    pool = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    keys_values = pool[tables.long()].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[..., :context, :]
    q = torch.randn(rows * q_len, HEADS, HEAD, device="cuda", dtype=torch.bfloat16)
    return q, pool, tables, *keys_values.contiguous()


def time_attention(roofline: Roofline, rows: int, q_len: int, context: int) -> Case:
    """Time rows of so many queries each, the last of their context."""
    from paceline_kernels import triton_ops

    q, pool, tables, keys, values = paged(rows, q_len, context)
    before = context - q_len
    q_RHQD = q.unflatten(0, (rows, q_len)).transpose(1, 2).contiguous()
    # Without a mask torch takes its fastest kernel.
    mask = None
    if before > 0 and q_len > 1:
        mask = torch.ones(q_len, context, dtype=torch.bool, device="cuda").tril(before)

    def batch(count: int) -> AttentionBatch:
        lens = torch.full((count,), context, dtype=torch.int32, device="cuda")
        cu_q = torch.arange(count + 1, dtype=torch.int32) * q_len
        return AttentionBatch(cu_q, lens, tables[-count:], BLOCK_SIZE, q_len)

    def ours(batch: AttentionBatch) -> torch.Tensor:
        last = q[-batch.kv_lens.shape[0] * q_len :]
        return triton_ops.paged_attention(last, pool, batch, HEAD**-0.5)

    def theirs() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q_RHQD, keys, values, attn_mask=mask, is_causal=before == 0, enable_gqa=True
        )

    all_rows = batch(rows)
    whole = ours(all_rows)
    num_seen = q_len * before + q_len * (q_len + 1) / 2
    num_bytes = keys.nbytes + values.nbytes + 2 * q.nbytes
    return {
        "case": f"attention rows={rows} q={q_len} context={context}",
        "ours_us": time_us(lambda: ours(all_rows)),
        "torch_us": time_us(theirs),
        "roofline_us": roofline.us(num_bytes, 4 * rows * HEADS * HEAD * num_seen),
        "error": float((whole - theirs().transpose(1, 2).flatten(0, 1)).abs().max()),
        "is_invariant": torch.equal(ours(batch(1)), whole[-q_len:]),
    }


def attention(roofline: Roofline) -> Iterator[Case]:
    """Time decode rows, drafts of eight tokens, and chunks of prompts."""
    for context in (2048, 32768):
        yield time_attention(roofline, 1, 1, context)
    yield time_attention(roofline, 16, 1, 4096)
    yield time_attention(roofline, 64, 1, 8192)
    yield time_attention(roofline, 16, 8, 4096)
    for context in (2048, 16384):
        yield time_attention(roofline, 1, 2048, context)


def time_product(
    roofline: Roofline,
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    ours: Callable[[torch.Tensor], torch.Tensor],
    theirs: Callable[[torch.Tensor], torch.Tensor],
) -> Case:
    """Time a product of x with a weight."""
    whole = ours(x)
    num_bytes = weight.nbytes + x.nbytes + whole.nbytes
    is_int8 = weight.dtype == torch.int8
    return {
        "case": f"{name} rows={x.shape[0]} in={weight.shape[1]} out={weight.shape[0]}",
        "ours_us": time_us(lambda: ours(x)),
        "torch_us": time_us(lambda: theirs(x)),
        "roofline_us": roofline.us(num_bytes, 2 * len(x) * weight.numel(), is_int8=is_int8),
        "error": float((whole - theirs(x)).abs().max()),
        "is_invariant": torch.equal(ours(x[-1:]), whole[-1:]),
    }


def linear(roofline: Roofline) -> Iterator[Case]:
    """Time plain, gated and int8 products; torch has bf16 for the last one too."""
    from paceline_kernels import triton_ops

    weight = torch.randn(2 * INTERMEDIATE, HIDDEN, device="cuda", dtype=torch.bfloat16) / 64
    int8, scale = triton_ops.quantize_rows(weight)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)

    def gated(x: torch.Tensor) -> torch.Tensor:
        gate, up = plain(x).chunk(2, dim=-1)
        return F.silu(gate) * up

    operations = (
        ("linear", weight, lambda x: triton_ops.linear(x, weight), plain),
        ("gated", weight, lambda x: triton_ops.linear_silu_mul(x, weight), gated),
        ("int8", int8, lambda x: triton_ops.linear_int8(x, int8, scale), plain),
    )
    for rows in (1, 16, 64, 512, 4096):
        x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
        for name, held, ours, theirs in operations:
            yield time_product(roofline, name, x, held, ours, theirs)


def graph(_roofline: Roofline) -> Iterator[Case]:
    """Time eight layers of attention, eagerly and captured, with a padded batch."""
    from paceline_kernels import triton_ops

    rows, context, layers = 5, 1024, 8
    _, pool, tables, _, _ = paged(rows + 1, 1, context)
    queries = torch.randn(100, HEADS, HEAD, device="cuda", dtype=torch.bfloat16)

    def step(buffers: triton_ops.DecodeBuffers) -> torch.Tensor:
        x = queries[buffers.tokens_R]
        triton_ops.write_kv(x[:, :KV_HEADS], x[:, :KV_HEADS], pool, buffers.slots_R)
        for _ in range(layers):
            x = triton_ops.paged_attention(x, pool, buffers.attention, HEAD**-0.5)
        return x

    padding_page = int(tables[rows, 0])
    graphs = triton_ops.DecodeGraphs(
        step,
        triton_ops.batch_sizes(8),
        num_blocks=tables.shape[1],
        block_size=BLOCK_SIZE,
        padding_page=padding_page,
    )
    graphs.capture()
    tokens = torch.arange(rows, device="cuda")
    positions = torch.full_like(tokens, context - 1)
    slots = tables[:rows, -1].long() * BLOCK_SIZE + BLOCK_SIZE - 1
    lens = torch.full((rows,), context, dtype=torch.int32, device="cuda")
    cu_q = torch.arange(rows + 1, dtype=torch.int32)
    attention = AttentionBatch(cu_q, lens, tables[:rows], BLOCK_SIZE, 1)
    eager = triton_ops.DecodeBuffers(tokens, positions, slots, attention, padding_page)
    expected = step(eager)
    captured = graphs.run(tokens, positions, slots, attention).clone()
    yield {
        "case": f"graph rows={rows} padded=8 layers={layers}",
        "ours_us": time_us(lambda: graphs.run(tokens, positions, slots, attention)),
        "eager_us": time_us(lambda: step(eager)),
        "error": float((captured - expected).abs().max()),
        "is_invariant": torch.equal(captured, expected),
    }


def main() -> None:
    """Print all cases."""
    if not torch.cuda.is_available():
        sys.exit("triton_gpu: no CUDA device; this benchmark times kernels on one")
    torch.manual_seed(0)
    roofline = Roofline()
    device = torch.cuda.get_device_name()
    for cases in (attention, linear, graph):
        for case in cases(roofline):
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in case.items()}
            print(json.dumps(rounded | {"device": device}), flush=True)


if __name__ == "__main__":
    main()
