"""The engine's only door to the kernels package."""

from paceline_kernels import (
    AttentionBatch,
    QuantisedWeight,
    gumbel_noise,
    gumbel_noise_at,
    linear,
    move_kv,
    paged_attention,
    philox_uniform_at,
    quantise_weight,
    rms_norm,
    rotary,
    silu_mul,
    truncate_logits,
    write_kv,
)
from paceline_kernels.cpu.candidates import find_candidates
from paceline_kernels.cpu.decoder import DecoderShape, FusedDecoder, LayerTensors
from paceline_kernels.cpu.library import backend, build_id, library, set_threads, threads
from paceline_kernels.cpu.likeliest import Likeliest, likeliest
from paceline_kernels.cpu.ops import PackedLinear
from paceline_kernels.cpu.sampling import DrawRow, draw


def has_cpp_kernels() -> bool:
    """Tell whether the C++ kernels were built and may be used."""
    return library() is not None


__all__ = [
    "AttentionBatch",
    "DecoderShape",
    "DrawRow",
    "FusedDecoder",
    "LayerTensors",
    "Likeliest",
    "PackedLinear",
    "QuantisedWeight",
    "backend",
    "build_id",
    "draw",
    "find_candidates",
    "gumbel_noise",
    "gumbel_noise_at",
    "has_cpp_kernels",
    "likeliest",
    "linear",
    "move_kv",
    "paged_attention",
    "philox_uniform_at",
    "quantise_weight",
    "rms_norm",
    "rotary",
    "set_threads",
    "silu_mul",
    "threads",
    "truncate_logits",
    "write_kv",
]
