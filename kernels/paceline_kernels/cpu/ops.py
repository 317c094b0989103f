"""The C++ operations one by one, by the names and shapes of `paceline_kernels.reference`.

The engine runs whole passes (decoder.py) and single products beside them (`PackedLinear`); the
rest is what passes are made of, for tests and for trying an idea. Results are float32 whatever
goes in.
"""

from __future__ import annotations

import ctypes
import weakref

import torch

from paceline_kernels.cpu import library as lib
from paceline_kernels.cpu.decoder import WEIGHT_TYPES, batch_pointers
from paceline_kernels.reference import AttentionBatch

_TYPES = {torch.float32: lib.F32, torch.bfloat16: lib.BF16, torch.float16: lib.F16}


def _library() -> ctypes.CDLL:
    loaded = lib.library()
    if loaded is None:
        raise RuntimeError("C++ kernels are not available")
    return loaded


def rms_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise by the root mean square, [N, D]."""
    x_ND, weight_D = x_ND.float().contiguous(), weight_D.float().contiguous()
    out_ND = torch.empty_like(x_ND)
    _library().pl_rms_norm(
        x_ND.data_ptr(), weight_D.data_ptr(), eps, *x_ND.shape, out_ND.data_ptr()
    )
    return out_ND


def rotary(
    q_NHD: torch.Tensor, k_NKD: torch.Tensor, cos_sin_C2D: torch.Tensor, positions_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by position, halves paired."""
    rotated = []
    for x in (q_NHD, k_NKD):
        out = x.float().clone(memory_format=torch.contiguous_format)
        _library().pl_rotate(
            out.data_ptr(), positions_N.data_ptr(), cos_sin_C2D.data_ptr(), *out.shape
        )
        rotated.append(out)
    return rotated[0], rotated[1]


class PackedLinear:
    """A weight [O, D] packed for products; gated, its first half of rows gates the second."""

    def __init__(
        self,
        weight_OD: torch.Tensor,
        bias_O: torch.Tensor | None = None,
        *,
        weight_type: str = "f32",
        is_gated: bool = False,
    ) -> None:
        self._lib = _library()
        self._outputs = weight_OD.shape[0] // 2 if is_gated else weight_OD.shape[0]
        self._is_gated = is_gated
        weight_OD = weight_OD.contiguous()
        bias_O = None if bias_O is None else bias_O.float().contiguous()
        self._handle = self._lib.pl_linear_new(
            *(WEIGHT_TYPES[weight_type], weight_OD.data_ptr(), _TYPES[weight_OD.dtype]),
            *(*weight_OD.shape, None if bias_O is None else bias_O.data_ptr(), is_gated),
        )
        weakref.finalize(self, self._lib.pl_linear_free, self._handle)

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b, [N, O], or silu of its first half times its second, [N, O / 2]."""
        x_ND = x_ND.float().contiguous()
        out_NO = torch.empty(len(x_ND), self._outputs)
        self._lib.pl_linear(
            self._handle, x_ND.data_ptr(), len(x_ND), self._is_gated, out_NO.data_ptr()
        )
        return out_NO


def paged_attention(
    q_NHD: torch.Tensor,
    kv_P2KTD: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    *,
    window: int | None = None,
    is_split: bool = False,
) -> torch.Tensor:
    """Attend each query to its row's context, [N, H, D]; queries take the KV's precision.

    `is_split` sums parts of the context up apart, as a step with few lanes does; the result is
    the same to the bit.
    """
    q_NHD = q_NHD.float().contiguous()
    out_NHD = torch.empty_like(q_NHD)
    kv_heads, block_size, size = kv_P2KTD.shape[2:]
    shape = lib.AttentionShape(
        *(q_NHD.shape[1], kv_heads, size, block_size, scale, window or 0),
        _TYPES[kv_P2KTD.dtype],
    )
    kept: list[torch.Tensor] = []
    pointers = batch_pointers(batch, kept)
    _library().pl_attention(
        *(shape, kv_P2KTD.data_ptr(), kv_P2KTD.stride(0) * kv_P2KTD.element_size(), pointers),
        *(q_NHD.data_ptr(), out_NHD.data_ptr(), is_split),
    )
    return out_NHD
