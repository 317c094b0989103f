"""The engine's only door to the kernels package."""

from paceline_kernels import (
    AttentionBatch,
    gumbel_noise,
    gumbel_noise_at,
    linear,
    paged_attention,
    rms_norm,
    rotary,
    silu_mul,
    truncate_logits,
    write_kv,
)

__all__ = [
    "AttentionBatch",
    "gumbel_noise",
    "gumbel_noise_at",
    "linear",
    "paged_attention",
    "rms_norm",
    "rotary",
    "silu_mul",
    "truncate_logits",
    "write_kv",
]
