"""Names the likeliest tokens of some distributions by one call into the C++ kernels.

Shape legend: M rows of logits, P places that are looked at, V vocabulary, K tokens named.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from paceline_kernels.cpu import library as lib

_ENTRY_BYTES = 4 + 2
"""An id and its probability."""


class Likeliest(NamedTuple):
    """The likeliest tokens of some distributions, best first, of equal ones the lower first.

    Bytes, as samples have them: a view by numpy takes 1 us, as long as all else around the call.
    """

    ids_PK: bytes
    """int32"""
    probs_PK: bytes
    """float16, at temperature 1."""
    tail_P: bytes
    """float16, mass of all others."""


def likeliest(logits_MV: torch.Tensor, places: Sequence[int], top: int) -> Likeliest:
    """Name the K = `top` likeliest tokens of the rows `places` of float32 logits.

    One thread computes it, and no row is copied. Nothing is a NaN: +inf shares the mass out among
    its tokens, and a row with a NaN or without a possible token has a tail of 1.
    """
    loaded = lib.library()
    if loaded is None:
        raise RuntimeError("C++ kernels are not available")
    if logits_MV.dtype != torch.float32 or logits_MV.dim() != 2:
        raise ValueError(f"logits must be float32 [M, V], not {logits_MV.shape}")
    num_rows, vocab = logits_MV.shape
    if not 1 <= top <= vocab:
        raise ValueError(f"{top} of {vocab} tokens")
    count = len(places)
    if count and not 0 <= min(places) <= max(places) < num_rows:
        raise ValueError(f"places {places} of {num_rows} rows")
    logits_MV = logits_MV.contiguous()
    out = (ctypes.c_char * (count * (top * _ENTRY_BYTES + 2)))()
    packed = struct.pack(f"={count}q", *places)
    loaded.pl_likeliest(logits_MV.data_ptr(), vocab, packed, count, top, out)
    probs, tail = count * top * 4, count * top * _ENTRY_BYTES
    found = out.raw
    return Likeliest(found[:probs], found[probs:tail], found[tail:])
