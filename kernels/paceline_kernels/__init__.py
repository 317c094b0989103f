"""Tensor operations of the engine behind one API; imports nothing of paceline.

`reference` is the plain torch implementation every other back end is compared with.
"""

from paceline_kernels.reference import (
    AttentionBatch,
    QuantisedWeight,
    linear,
    move_kv,
    paged_attention,
    quantise_rows,
    quantise_weight,
    rms_norm,
    rotary,
    silu_mul,
    write_kv,
)
from paceline_kernels.sampling import (
    gumbel_noise,
    gumbel_noise_at,
    philox4x32,
    philox_uniform,
    philox_uniform_at,
    truncate_logits,
)

__all__ = [
    "AttentionBatch",
    "QuantisedWeight",
    "gumbel_noise",
    "gumbel_noise_at",
    "linear",
    "move_kv",
    "paged_attention",
    "philox4x32",
    "philox_uniform",
    "philox_uniform_at",
    "quantise_rows",
    "quantise_weight",
    "rms_norm",
    "rotary",
    "silu_mul",
    "truncate_logits",
    "write_kv",
]
