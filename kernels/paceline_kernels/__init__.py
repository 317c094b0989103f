"""Tensor operations of the engine behind one API; imports nothing of paceline.

`reference` is the plain torch implementation every other back end is compared with.
"""

from paceline_kernels.reference import (
    AttentionBatch,
    linear,
    paged_attention,
    rms_norm,
    rotary,
    silu_mul,
    write_kv,
)
from paceline_kernels.sampling import gumbel_noise, philox_uniform, truncate_logits

__all__ = [
    "AttentionBatch",
    "gumbel_noise",
    "linear",
    "paged_attention",
    "philox_uniform",
    "rms_norm",
    "rotary",
    "silu_mul",
    "truncate_logits",
    "write_kv",
]
