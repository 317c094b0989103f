"""The fused C++ decoder computes what the decoder made of torch operations computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline.engine.models.config import load_model_config, rope_table
from paceline.engine.models.decoder import DecoderModel
from paceline.engine.weights import load_tensors
from paceline_kernels import AttentionBatch
from paceline_kernels.cpu import library
from paceline_kernels.cpu.decoder import DecoderShape, FusedDecoder, LayerTensors

MODEL = Path(__file__).parents[2] / "models" / "demo"
BLOCK = 16

pytestmark = pytest.mark.skipif(
    library.library() is None, reason="the C++ kernels need a compiler at set-up"
)


def _fused(weight_type: str, kv_dtype: torch.dtype) -> FusedDecoder:
    c, w = load_model_config(MODEL), dict(load_tensors(MODEL))
    shape = DecoderShape(
        *(c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads),
        *(c.head_dim, c.vocab_size, BLOCK, c.rms_norm_eps),
    )
    fused = FusedDecoder(shape, weight_type=weight_type, kv_dtype=kv_dtype)
    for i in range(c.num_layers):
        base = f"model.layers.{i}."
        q, k, v = (w[f"{base}self_attn.{n}_proj.weight"] for n in "qkv")
        tensors = LayerTensors(
            qkv=(q, k, v),
            o=w[f"{base}self_attn.o_proj.weight"],
            gate_up=(w[f"{base}mlp.gate_proj.weight"], w[f"{base}mlp.up_proj.weight"]),
            down=w[f"{base}mlp.down_proj.weight"],
            input_norm=w[f"{base}input_layernorm.weight"],
            post_norm=w[f"{base}post_attention_layernorm.weight"],
            window=c.windows[i],
        )
        fused.set_layer(i, tensors)
    embedding = w["model.embed_tokens.weight"]
    fused.set_ends(embedding, w.get("lm_head.weight", embedding), w["model.norm.weight"])
    return fused


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionBatch]


def _inputs(vocab: int, rows: list[tuple[int, int]], width: int) -> Inputs:
    """Tokens of rows (start, count); row r owns pages [r * width, (r + 1) * width)."""
    positions = [p for start, count in rows for p in range(start, start + count)]
    owners = [r for r, (_, count) in enumerate(rows) for _ in range(count)]
    slots = [r * width * BLOCK + p for r, p in zip(owners, positions, strict=True)]
    tokens = torch.randint(
        3, vocab, (len(positions),), generator=torch.Generator().manual_seed(len(positions))
    )
    cu_q = torch.tensor([0, *(count for _, count in rows)], dtype=torch.int32).cumsum(0).int()
    batch = AttentionBatch(
        cu_q=cu_q,
        kv_lens=torch.tensor([start + count for start, count in rows], dtype=torch.int32),
        block_tables=torch.arange(len(rows) * width, dtype=torch.int32).view(len(rows), width),
        block_size=BLOCK,
        max_q=max(count for _, count in rows),
    )
    return tokens, torch.tensor(positions), torch.tensor(slots), batch


@pytest.mark.parametrize(
    ("weight_type", "kv_dtype", "tolerance"),
    [("f32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 0.1), ("int8", torch.bfloat16, 0.6)],
)
def test_prompts_and_decode_steps_agree_with_the_reference(
    weight_type: str, kv_dtype: torch.dtype, tolerance: float
) -> None:
    config, width = load_model_config(MODEL), 36
    fused = _fused(weight_type, kv_dtype)
    model = DecoderModel(config, load_tensors(MODEL), dtype=torch.float32, device="cpu")
    table = rope_table(config, width * BLOCK)
    pages = (3 * width, config.num_layers, 2, config.num_kv_heads, BLOCK, config.head_dim)
    # What lies behind a context may be anything.
    kv_fused = torch.full(pages, float("nan"), dtype=kv_dtype)
    kv_reference = torch.zeros(pages)
    for rows in ([(0, 300), (0, 17), (0, 1)], [(300, 1), (17, 5), (1, 1)], [(301, 99), (22, 1)]):
        tokens, positions, slots, batch = _inputs(config.vocab_size, rows, width)
        with torch.inference_mode():
            got = fused.forward(tokens, positions, table, kv_fused, slots, batch)
            expected = model.forward(tokens, positions, kv_reference, slots, batch)
            last = batch.cu_q[1:].long() - 1
            torch.testing.assert_close(
                fused.logits(got, last), model.logits(expected, last), atol=tolerance, rtol=0
            )


@pytest.mark.parametrize(
    ("weight_type", "kv_dtype"),
    [("f32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.bfloat16)],
)
def test_a_row_does_not_depend_on_its_batch_or_its_chunks(
    weight_type: str, kv_dtype: torch.dtype
) -> None:
    config, width = load_model_config(MODEL), 20
    fused = _fused(weight_type, kv_dtype)
    table = rope_table(config, width * BLOCK)
    pages = (3 * width, config.num_layers, 2, config.num_kv_heads, BLOCK, config.head_dim)
    tokens, positions, slots, batch = _inputs(config.vocab_size, [(0, 290), (0, 40)], width)
    together = fused.forward(
        tokens, positions, table, torch.zeros(pages, dtype=kv_dtype), slots, batch
    )
    kv = torch.zeros(pages, dtype=kv_dtype)
    apart = []
    for start, end in [(0, 1), (1, 33), (33, 289), (289, 290)]:
        _, at, where, part = _inputs(config.vocab_size, [(start, end - start)], width)
        apart.append(fused.forward(tokens[start:end].clone(), at, table, kv, where, part))
    assert torch.equal(torch.cat(apart), together[:290])


def test_layers_left_out_agree_with_the_reference() -> None:
    config, width = load_model_config(MODEL), 4
    fused = _fused("f32", torch.float32)
    model = DecoderModel(config, load_tensors(MODEL), dtype=torch.float32, device="cpu")
    table = rope_table(config, width * BLOCK)
    pages = (2 * width, config.num_layers, 2, config.num_kv_heads, BLOCK, config.head_dim)
    generator = torch.Generator().manual_seed(0)
    results = []
    for case in range(4):
        skip = [
            (bool(a), bool(m))
            for a, m in torch.rand(config.num_layers, 2, generator=generator) < 0.5
        ]
        if case == 0:
            skip = [(True, True)] * config.num_layers
        kv_fused, kv_reference = torch.full((2, *pages), 7.0)
        for rows in ([(0, 30), (0, 5)], [(30, 1), (5, 3)]):
            tokens, positions, slots, batch = _inputs(config.vocab_size, rows, width)
            with torch.inference_mode():
                got = fused.forward(tokens, positions, table, kv_fused, slots, batch, skip)
                expected = model.forward(tokens, positions, kv_reference, slots, batch, skip)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kv_fused, kv_reference, atol=1e-4, rtol=1e-4)
        for layer, (skips_attention, _) in enumerate(skip):
            assert bool((kv_fused[:, layer] == 7.0).all()) == skips_attention
        results.append(got)
    assert not any(torch.equal(a, results[0]) for a in results[1:])


def test_nothing_left_out_is_the_whole_model() -> None:
    config = load_model_config(MODEL)
    fused, table = _fused("f32", torch.float32), rope_table(config, BLOCK)
    pages = (1, config.num_layers, 2, config.num_kv_heads, BLOCK, config.head_dim)
    tokens, positions, slots, batch = _inputs(config.vocab_size, [(0, 9)], 1)
    whole, same = (
        fused.forward(tokens, positions, table, torch.zeros(pages), slots, batch, skip)
        for skip in (None, [(False, False)] * config.num_layers)
    )
    assert torch.equal(whole, same)
    with pytest.raises(ValueError, match="entries of skip"):
        fused.forward(
            tokens, positions, table, torch.zeros(pages), slots, batch, [(True, True)] * 99
        )
