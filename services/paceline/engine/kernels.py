"""The engine's only door to the kernels package."""

from paceline_kernels import (
    AttentionBatch,
    QuantisedWeight,
    gumbel_noise,
    gumbel_noise_at,
    linear,
    paged_attention,
    quantise_weight,
    rms_norm,
    rotary,
    silu_mul,
    truncate_logits,
    write_kv,
)
from paceline_kernels.cpu.decoder import DecoderShape, FusedDecoder, LayerTensors
from paceline_kernels.cpu.library import backend, library, set_threads


def has_fused_decoder() -> bool:
    """Tell whether the C++ kernels were built and may be used."""
    return library() is not None


__all__ = [
    "AttentionBatch",
    "DecoderShape",
    "FusedDecoder",
    "LayerTensors",
    "QuantisedWeight",
    "backend",
    "gumbel_noise",
    "gumbel_noise_at",
    "has_fused_decoder",
    "linear",
    "paged_attention",
    "quantise_weight",
    "rms_norm",
    "rotary",
    "set_threads",
    "silu_mul",
    "truncate_logits",
    "write_kv",
]
