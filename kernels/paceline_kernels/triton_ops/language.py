"""What all kernels share: the typed decorator, and the precision of matrix products.

Runtime arguments of kernels are annotated `tl.tensor`: pointers and scalars alike are tensors
inside a kernel. Names in capitals are compile-time constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-untyped]


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function for the GPU at its first launch; launch it as `f[grid](...)`."""
    return triton.jit(function)


def precision(dtype: torch.dtype) -> str:
    """Return `input_precision` of products of a type.

    float32 is multiplied as such, never as TF32, whose 10 bits of mantissa the reference's
    tolerance excludes. Other types do not know the difference.
    """
    return "ieee" if dtype == torch.float32 else "tf32"
