"""The whole forward pass as one call into the C++ kernels.

Shape legend: N tokens, M rows with logits, E hidden size, I inner size, H query heads, K key/value
heads, D head size, P pages, L layers, T tokens per page, V vocabulary, C positions.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline_kernels.cpu import library as lib
from paceline_kernels.reference import AttentionBatch

_TYPES = {torch.float32: lib.F32, torch.bfloat16: lib.BF16, torch.float16: lib.F16}
WEIGHT_TYPES = {"f32": lib.F32, "bf16": lib.BF16, "int8": lib.I8}


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a Llama-type decoder."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    block_size: int
    eps: float


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """One layer's tensors as a checkpoint holds them: f32, bf16 or f16, row-major."""

    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    o: torch.Tensor
    gate_up: tuple[torch.Tensor, torch.Tensor]
    down: torch.Tensor
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    qkv_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    window: int | None = None


class FusedDecoder:
    """Packed weights and the forward pass. Activations are float32 between products."""

    def __init__(self, shape: DecoderShape, *, weight_type: str, kv_dtype: torch.dtype) -> None:
        """Make an empty decoder; layers and ends follow.

        Args:
            shape: the sizes.
            weight_type: "f32", "bf16", or "int8" (one scale per output, activations quantised
                to int8 with one scale per token).
            kv_dtype: float32 or bfloat16.
        """
        loaded = lib.library()
        if loaded is None:
            raise RuntimeError("C++ kernels are not available")
        self._lib = loaded
        self._shape = shape
        self._config = lib.DecoderConfig(
            *(shape.hidden, shape.inner, shape.layers, shape.heads, shape.kv_heads),
            *(shape.head_size, shape.vocab, shape.block_size, shape.eps),
            *(WEIGHT_TYPES[weight_type], _TYPES[kv_dtype]),
        )
        self._kv_dtype = kv_dtype
        self._handle = loaded.pl_decoder_new(self._config)
        self._embedding_VE: torch.Tensor | None = None
        self._finalizer = weakref.finalize(self, loaded.pl_decoder_free, self._handle)

    def set_layer(self, index: int, tensors: LayerTensors) -> None:
        """Pack a layer's weights; pages of the files they are mapped from are let go."""
        kept: list[torch.Tensor] = []
        pointers = lib.LayerPointers()
        for i, weight in enumerate(tensors.qkv):
            pointers.qkv[i] = _source(weight, kept)
        for i, weight in enumerate(tensors.gate_up):
            pointers.gate_up[i] = _source(weight, kept)
        pointers.o = _source(tensors.o, kept)
        pointers.down = _source(tensors.down, kept)
        for name in (
            *("input_norm", "post_norm", "q_norm", "k_norm"),
            *("qkv_bias", "o_bias", "gate_up_bias", "down_bias"),
        ):
            setattr(pointers, name, _floats(getattr(tensors, name), kept))
        pointers.window = tensors.window or 0
        self._lib.pl_decoder_layer(self._handle, self._config, index, pointers)
        for weight in (*tensors.qkv, tensors.o, *tensors.gate_up, tensors.down):
            self._drop_file_pages(weight)

    def set_ends(
        self, embedding_VE: torch.Tensor, head_VE: torch.Tensor, norm_E: torch.Tensor
    ) -> None:
        """Pack the head. The embedding stays where it is; only rows in use are read."""
        kept: list[torch.Tensor] = []
        self._embedding_VE = embedding_VE.contiguous()
        embedding, head = _source(self._embedding_VE, kept), _source(head_VE, kept)
        norm = _floats(norm_E, kept)
        self._lib.pl_decoder_ends(self._handle, self._config, embedding, head, norm)
        self._drop_file_pages(head_VE)

    def _drop_file_pages(self, weight: torch.Tensor) -> None:
        """Let go of a packed weight's pages; a mapped file gives them back when asked again."""
        if _is_mapped_file(weight.data_ptr()):
            self._lib.pl_drop_file_pages(weight.data_ptr(), weight.nbytes)

    def forward(
        self,
        tokens_N: torch.Tensor,
        positions_N: torch.Tensor,
        cos_sin_C2D: torch.Tensor,
        kv_PL2KTD: torch.Tensor,
        slots_N: torch.Tensor,
        attention: AttentionBatch,
        skip: Sequence[tuple[bool, bool]] | None = None,
    ) -> torch.Tensor:
        """Compute all tokens, store their KV, return the last layer's residuals, f32 [N, E].

        `skip` tells for each layer whether its attention and its MLP are left out: residuals
        pass them by, and an attention that is left out stores no KV.
        """
        out_NE = torch.empty(len(tokens_N), self._shape.hidden)
        kept: list[torch.Tensor] = []
        step = lib.Step(
            len(tokens_N),
            tokens_N.data_ptr(),
            positions_N.data_ptr(),
            slots_N.data_ptr(),
            cos_sin_C2D.data_ptr(),
            kv_PL2KTD.data_ptr(),
            batch_pointers(attention, kept),
            _flags(skip, self._shape.layers, kept),
        )
        self._lib.pl_decoder_forward(self._handle, step, out_NE.data_ptr())
        return out_NE

    def logits(self, residuals_NE: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
        """Return float32 logits of some rows of residuals, [M, V]."""
        out_MV = torch.empty(len(rows_M), self._shape.vocab)
        self._lib.pl_decoder_logits(
            self._handle, residuals_NE.data_ptr(), rows_M.data_ptr(), len(rows_M), out_MV.data_ptr()
        )
        return out_MV


def batch_pointers(batch: AttentionBatch, kept: list[torch.Tensor]) -> lib.Batch:
    """Describe a batch by pointers; `kept` holds what they point to."""
    cu_tree, parents = None, None
    if batch.cu_tree is not None and batch.tree_parents is not None:
        kept += [batch.cu_tree.contiguous(), batch.tree_parents.contiguous()]
        cu_tree, parents = kept[-2].data_ptr(), kept[-1].data_ptr()
    return lib.Batch(
        len(batch.kv_lens),
        batch.cu_q.data_ptr(),
        batch.kv_lens.data_ptr(),
        batch.block_tables.data_ptr(),
        batch.block_tables.shape[1],
        cu_tree,
        parents,
    )


def _flags(
    skip: Sequence[tuple[bool, bool]] | None, layers: int, kept: list[torch.Tensor]
) -> int | None:
    """Point to what is left out; `kept` holds it."""
    if skip is None:
        return None
    if len(skip) != layers:
        raise ValueError(f"{len(skip)} entries of skip for {layers} layers")
    kept.append(torch.tensor(skip, dtype=torch.uint8))
    return kept[-1].data_ptr()


def _is_mapped_file(address: int) -> bool:
    """Tell whether memory is that of a file; without /proc, no."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        bounds, _, _, _, inode = line.split(maxsplit=5)[:5]
        begin, end = (int(part, 16) for part in bounds.split("-"))
        if begin <= address < end:
            return inode != "0"
    return False


def _source(weight: torch.Tensor, kept: list[torch.Tensor]) -> lib.Source:
    kept.append(weight.contiguous())
    return lib.Source(kept[-1].data_ptr(), _TYPES[weight.dtype], weight.shape[0])


def _floats(values: torch.Tensor | None, kept: list[torch.Tensor]) -> ctypes.c_void_p | None:
    if values is None:
        return None
    kept.append(values.float().contiguous())
    return ctypes.c_void_p(kept[-1].data_ptr())
