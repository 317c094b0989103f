"""Step costs of accelerators that nobody here has: derived from data sheets, not measured.

A step reads the weights once and computes 2 operations per parameter and token; it takes the
longer of the two (Williams et al. 2009, "Roofline"). Attention comes on top: decoding rows read
the KV of their contexts, chunks compute with theirs:

    tokens(n)     = overhead + max(weight bytes / bandwidth, 2 * parameters * n / operations per s)
    context       = KV bytes per token / bandwidth          per token of context of decoding rows
    chunk context = 4 * layers * query width / operations   per pair of chunk token and context
    KV per token  = 2 * layers * KV heads * head size * bytes per number

4 = multiply and add, for scores and for values. Bandwidth and operations per second are the data
sheet's, times what kernels reach of them (`MEMORY_RATIO`, `COMPUTE_RATIO`): what serving engines
report is 0.7 to 0.9 for reading and 0.4 to 0.7 for large products. So figures made with these
costs compare policies with each other on one plausible machine; they are no promise about it.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.domain.cost import Curve, StepCost, StepCurves

MEMORY_RATIO = 0.8
COMPUTE_RATIO = 0.55


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device, by its data sheet."""

    name: str
    memory_bytes: float
    bytes_per_s: float
    operations_per_s: float
    """Dense products of 16-bit numbers, without the doubling for sparse weights."""


@dataclass(frozen=True, slots=True)
class TransformerSize:
    """What of a model decides about time and memory."""

    name: str
    parameters: float
    weight_bytes: float
    layers: int
    query_width: int
    """Query heads times head size."""
    kv_width: int
    """KV heads times head size."""
    kv_element_bytes: int = 2

    @property
    def kv_token_bytes(self) -> int:
        """KV of one token."""
        return 2 * self.layers * self.kv_width * self.kv_element_bytes


A100 = Accelerator("A100 80 GB SXM", 80e9, 2.039e12, 312e12)
"""NVIDIA A100 data sheet (2021): 2,039 GB/s, 312 TFLOPS bf16."""
H100 = Accelerator("H100 80 GB SXM", 80e9, 3.35e12, 989e12)
"""NVIDIA H100 data sheet: 3.35 TB/s, 989 TFLOPS bf16 (1,979 with sparsity)."""
L4 = Accelerator("L4 24 GB", 24e9, 300e9, 121e12)
"""NVIDIA L4 data sheet: 300 GB/s, 121 TFLOPS bf16 (242 with sparsity)."""

LLAMA_8B = TransformerSize("8B bf16", 8.03e9, 16.06e9, 32, 4096, 1024)
"""Llama 3.1 8B: 32 layers, 32 query and 8 KV heads of 128; KV 128 KiB per token."""
LLAMA_8B_INT8 = TransformerSize("8B int8", 8.03e9, 8.03e9, 32, 4096, 1024)
"""The same with weights of one byte, computed in 16 bit."""

STEP_OVERHEAD_S = 0.002
"""Planning, launching, drawing: what a step takes however little it computes."""
ROW_S = 4e-6
"""Drawing and launching per sequence."""
CHUNK_S = 1e-4
"""Per chunk."""
USABLE_RATIO = 0.9
"""Memory for weights and KV; the rest is for activations and the runtime."""


def roofline_cost(accelerator: Accelerator, model: TransformerSize) -> StepCost:
    """Return what steps of a model take on a device."""
    bandwidth = MEMORY_RATIO * accelerator.bytes_per_s
    operations = COMPUTE_RATIO * accelerator.operations_per_s
    read_s = model.weight_bytes / bandwidth
    token_s = 2 * model.parameters / operations
    knee = max(2, round(read_s / token_s))
    context_s = model.kv_token_bytes / bandwidth
    pair_s = 4 * model.layers * model.query_width / operations
    base_s = STEP_OVERHEAD_S + read_s
    return StepCost(
        base_s=base_s,
        row_s=ROW_S,
        token_s=token_s,
        context_s=context_s,
        curves=StepCurves(
            tokens=Curve((1, knee, 2 * knee), (base_s, base_s, base_s + knee * token_s)),
            rows=Curve((0, 1024), (0.0, 1024 * ROW_S)),
            contexts=Curve((0, 1 << 20), (0.0, (1 << 20) * context_s)),
            prefill_row_s=CHUNK_S,
            prefill_read_s=context_s,
            prefill_context_s=pair_s,
            node_context_s=pair_s,
        ),
    )


def kv_tokens(accelerator: Accelerator, model: TransformerSize) -> int:
    """Return the tokens whose KV fits beside the weights."""
    left = USABLE_RATIO * accelerator.memory_bytes - model.weight_bytes
    return int(left / model.kv_token_bytes)
