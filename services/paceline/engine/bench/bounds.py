"""Bounds on decode and prefill that follow from a machine's rates and a model's shape.

A decode step of C requests reads every weight once and the KV of C requests, and computes C
tokens: step >= max(bytes / bandwidth, flops / rate). Prefill is bound by the rate alone; the
head runs for a prompt's last token only. Pure functions of values.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.engine.bench.machine import MachineRates
from paceline.engine.models.config import ModelConfig

_WEIGHT_BYTES = {"f32": 4.0, "bf16": 2.0, "int8": 1 + 2 / 32}
"""Per weight; int8 with one 16-bit scale for 32 of them."""

_KV_BYTES = {"f32": 4.0, "bf16": 2.0, "int8": 2.0}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What of a model's shape its bounds depend on."""

    num_linear: int
    """Weights of all layers' products."""
    num_head: int
    """Weights of the head."""
    num_layers: int
    q_size: int
    kv_size: int


def model_size(config: ModelConfig) -> ModelSize:
    """Return a model's size."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_layer = 2 * hidden * q_size + 2 * hidden * kv_size + 3 * hidden * inner
    return ModelSize(
        num_linear=config.num_layers * per_layer,
        num_head=config.vocab_size * hidden,
        num_layers=config.num_layers,
        q_size=q_size,
        kv_size=kv_size,
    )


def decode_bound_tok_s(
    size: ModelSize, rates: MachineRates, dtype: str, *, context: float, concurrency: int
) -> float:
    """Return the most tokens per second of so many requests that decode together."""
    num_weights = size.num_linear + size.num_head
    kv_bytes = 2 * size.num_layers * size.kv_size * _KV_BYTES[dtype] * context
    num_bytes = num_weights * _WEIGHT_BYTES[dtype] + concurrency * kv_bytes
    flops = 2 * num_weights + 4 * size.num_layers * size.q_size * context
    memory_s = num_bytes / (rates.read_gb_s * 1e9)
    compute_s = concurrency * flops / (rates.gflops[dtype] * 1e9)
    return concurrency / max(memory_s, compute_s)


def prefill_bound_tok_s(
    size: ModelSize, rates: MachineRates, dtype: str, *, prompt_len: int
) -> float:
    """Return the most prompt tokens per second."""
    attention = 4 * size.num_layers * size.q_size * prompt_len / 2
    flops = 2 * size.num_linear + 2 * size.num_head / prompt_len + attention
    return rates.gflops[dtype] * 1e9 / flops
