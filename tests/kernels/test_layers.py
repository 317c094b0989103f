"""Layer operations against the modules of transformers and torch, in f32 and bf16."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from paceline_kernels import linear, move_kv, rms_norm, rotary, silu_mul, write_kv

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@DTYPES
@pytest.mark.parametrize("size", [1, 64, 80, 384])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(dtype: torch.dtype, size: int, scale: float) -> None:
    module = LlamaRMSNorm(size, eps=1e-5)
    nn.init.normal_(module.weight)
    module = module.to(dtype)
    x_ND = (torch.randn(7, size) * scale).to(dtype)
    expected = module(x_ND)
    assert torch.equal(rms_norm(x_ND, module.weight, 1e-5), expected)
    assert expected.dtype == dtype
    # Also over heads: [N, H, D].
    x_NHD = torch.randn(7, 3, size).to(dtype)
    assert torch.equal(rms_norm(x_NHD, module.weight, 1e-5), module(x_NHD))


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("size", [2, 24, 64, 80, 128])
def test_rotary(dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> None:
    positions = torch.tensor([0, 1, 5, 999, 5, 13])
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(1000).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    table = torch.stack((angles.cos(), angles.sin()), dim=1)
    q, k = torch.randn(6, heads, size).to(dtype), torch.randn(6, kv_heads, size).to(dtype)
    ours = rotary(q, k, table, positions)
    cos, sin = (x.to(dtype)[None] for x in table[positions].unbind(1))
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b[0].transpose(0, 1))


@DTYPES
def test_gated_mlp(dtype: torch.dtype) -> None:
    config = LlamaConfig(hidden_size=48, intermediate_size=80, num_attention_heads=4, mlp_bias=True)
    mlp = LlamaMLP(config).to(dtype)
    x = torch.randn(9, 48).to(dtype)
    with torch.inference_mode():
        weight = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        bias = torch.cat((mlp.gate_proj.bias, mlp.up_proj.bias))
        inner = silu_mul(linear(x, weight, bias))
        ours = linear(inner, mlp.down_proj.weight, mlp.down_proj.bias)
        theirs = mlp(x)
    # Fused and single products may sum in another order: one rounding of the type.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_write_kv_touches_its_slots_and_no_others(dtype: torch.dtype, block_size: int) -> None:
    pool = torch.randn(6, 3, 2, 2, block_size, 8).to(dtype)
    layer = pool[:, 1]
    before = pool.clone()
    slots = torch.randperm(6 * block_size)[: 3 * block_size]
    k, v = torch.randn(2, len(slots), 2, 8).to(dtype)
    write_kv(k, v, layer, slots)
    for i, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, block_size)
        assert torch.equal(layer[page, 0, :, offset], k[i])
        assert torch.equal(layer[page, 1, :, offset], v[i])
        before[page, 1, :, :, offset] = layer[page, :, :, offset]
    assert torch.equal(pool, before)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_move_kv_moves_forwards_and_touches_nothing_else(
    dtype: torch.dtype, block_size: int
) -> None:
    pool = torch.randn(24 // block_size + 1, 3, 2, 2, block_size, 8).to(dtype)
    # Tokens 5, 7, 8 and 11 of a row become tokens 5 to 8; its pages lie anywhere.
    pages = torch.randperm(len(pool))
    slots = torch.tensor(
        [int(pages[t // block_size]) * block_size + t % block_size for t in range(12)]
    )
    expected = pool.clone()
    for source, target in zip((5, 7, 8, 11), (5, 6, 7, 8), strict=True):
        page, offset = divmod(int(slots[source]), block_size)
        to_page, to_offset = divmod(int(slots[target]), block_size)
        for layer in range(3):
            for part in range(2):
                expected[to_page, layer, part, :, to_offset] = pool[page, layer, part, :, offset]
    move_kv(pool, slots[[5, 7, 8, 11]], slots[5:9])
    assert torch.equal(pool.float(), expected.float())
