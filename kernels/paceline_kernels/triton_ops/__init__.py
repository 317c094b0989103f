"""Triton versions of the reference operations for CUDA, and captured decode steps.

Names and signatures are the reference's where it has the operation. Importing this package
imports triton; `paceline_kernels` itself does not.

No result depends on the rows beside it: each operation sums in an order that the number of rows
does not change, and gives the matrix units the same shape of work for one row and for thousands.
"""

from paceline_kernels.triton_ops.attention import paged_attention
from paceline_kernels.triton_ops.gated import linear_silu_mul, linear_silu_mul_int8, silu_mul
from paceline_kernels.triton_ops.graph import DecodeBuffers, DecodeGraphs, batch_sizes
from paceline_kernels.triton_ops.int8 import linear_int8, quantize_rows
from paceline_kernels.triton_ops.linear import linear
from paceline_kernels.triton_ops.norm import add_rms_norm, rms_norm
from paceline_kernels.triton_ops.position import rotary, rotary_write_kv, write_kv

__all__ = [
    "DecodeBuffers",
    "DecodeGraphs",
    "add_rms_norm",
    "batch_sizes",
    "linear",
    "linear_int8",
    "linear_silu_mul",
    "linear_silu_mul_int8",
    "paged_attention",
    "quantize_rows",
    "rms_norm",
    "rotary",
    "rotary_write_kv",
    "silu_mul",
    "write_kv",
]
