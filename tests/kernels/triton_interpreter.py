"""The Triton kernels on CPU tensors, through Triton's interpreter.

Triton decides when it is imported whether functions are interpreted, and other packages import
it for their own use. So a second, interpreted copy is imported here and put in the place of the
process's own one only while a test runs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings

_OPS = "paceline_kernels.triton_ops"

_copy: dict[str, ModuleType] = {}


def _is_swapped(name: str) -> bool:
    # The compiled part of triton cannot be loaded twice, and knows nothing of interpretation.
    is_ours = name.split(".")[0] == "triton" or f"{name}.".startswith(f"{_OPS}.")
    return is_ours and not name.startswith("triton._C")


def _take() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if _is_swapped(name)}


@contextmanager
def interpreted() -> Iterator[None]:
    """Put the interpreted copy in the place of the process's own triton."""
    own = _take()
    sys.modules.update(_copy)
    # Lanes that a mask drops compute too: overflow there means nothing.
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setenv("TRITON_INTERPRET", "1")
        try:
            yield
        finally:
            _copy.update(_take())
            sys.modules.update(own)


def examples(number: int) -> settings:
    """Try some examples and do not shrink: interpreted kernels take tenths of a second."""
    return settings(max_examples=number, deadline=None, derandomize=True, phases=[Phase.generate])


@pytest.fixture(autouse=True, scope="module")
def uses_interpreter() -> Iterator[None]:
    """Interpret for the tests of a module that imports this."""
    with interpreted():
        yield


def _convert(
    original: Callable[..., np.ndarray], data: np.ndarray, source: Any, target: Any, rounding: Any
) -> np.ndarray:
    """Round float32 to bfloat16 to even, as GPUs do; the interpreter cuts or mangles it."""
    if (source.name, target.name) == ("bf16", "fp32"):
        return data.astype(np.uint32) << np.uint32(16)
    if (source.name, target.name) != ("fp32", "bf16"):
        return original(data, source, target, rounding)
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
    """Multiply bfloat16 as numbers, not bits, and sum so finely that no order shows.

    The interpreter leaves sums to BLAS, whose order depends on the width of a tile.
    """
    a64, b64 = (
        (x.data if x.dtype.name != "bf16" else _float32(x.data)).astype(np.float64) for x in (a, b)
    )
    out = a64 @ b64 + acc.data
    return type(acc)(out.astype(acc.data.dtype), acc.dtype.scalar)


def _float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


with interpreted():
    pytest.importorskip("triton")
    triton_ops: Any = importlib.import_module(_OPS)
    _interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    _interpreter._convert_float = partial(_convert, _interpreter._convert_float)
    _interpreter.InterpreterBuilder.create_dot = _dot
