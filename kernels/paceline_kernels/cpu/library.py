"""The shared library of C++ kernels: found, checked, and its functions typed.

`library()` is None where it was not built; every operation has its torch counterpart in
`paceline_kernels.reference` then. $PACELINE_KERNELS chooses: an instruction set ("amx",
"avx512", "avx2", "portable"), "reference" for none of it, unset for the best the machine has.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

logger = logging.getLogger(__name__)

KERNELS_VARIABLE = "PACELINE_KERNELS"
_INTERFACE = 5
_PATH = Path(__file__).parent / "libpaceline_cpu.so"

F32, BF16, I8, F16 = range(4)
"""Element types, as in csrc/types.h."""

MOST_CANDIDATES = 64
"""kMostBest of csrc/draw.h."""


class Source(ctypes.Structure):
    """A row-major tensor of a checkpoint."""

    _fields_ = [("data", c_void_p), ("type", c_int), ("rows", c_int)]


class DecoderConfig(ctypes.Structure):
    """Sizes of a decoder, csrc/decoder.h."""

    _fields_ = [
        *((name, c_int) for name in ("hidden", "inner", "layers", "heads", "kv_heads")),
        *((name, c_int) for name in ("head_size", "vocab", "block_size")),
        ("eps", c_float),
        ("weight_type", c_int),
        ("kv_type", c_int),
    ]


class LayerPointers(ctypes.Structure):
    """One layer's tensors, csrc/capi.cpp."""

    _fields_ = [
        ("qkv", Source * 3),
        ("o", Source),
        ("gate_up", Source * 2),
        ("down", Source),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("qkv_bias", "o_bias", "gate_up_bias", "down_bias")),
        ("window", c_int),
    ]


class Batch(ctypes.Structure):
    """Rows of a step, csrc/types.h."""

    _fields_ = [
        ("rows", c_int),
        *((name, c_void_p) for name in ("cu_q", "kv_lens", "tables")),
        ("table_width", c_int),
        *((name, c_void_p) for name in ("cu_tree", "tree_parents")),
    ]


class Step(ctypes.Structure):
    """A step's tokens, csrc/decoder.h."""

    _fields_ = [
        ("tokens", c_int),
        *((name, c_void_p) for name in ("token_ids", "positions", "slots", "cos_sin", "kv")),
        ("batch", Batch),
        ("skips", c_void_p),
    ]


class AttentionShape(ctypes.Structure):
    """What one layer's attention looks like, csrc/types.h."""

    _fields_ = [
        *((name, c_int) for name in ("heads", "kv_heads", "head_size", "block_size")),
        ("scale", c_float),
        ("window", c_int),
        ("kv_type", c_int),
    ]


class DrawCall(ctypes.Structure):
    """Rows to draw tokens of, csrc/draw.h."""

    _fields_ = [
        ("logits", c_void_p),
        *((name, c_int64) for name in ("rows", "vocab")),
        *((name, c_char_p) for name in ("params", "seen")),
        ("most_logprobs", c_int64),
        *((name, c_void_p) for name in ("tokens", "logprobs", "best_tokens", "best_logprobs")),
    ]


class CandidatesRow(ctypes.Structure):
    """What is proposed behind one node, csrc/draw.h."""

    _fields_ = [
        *((name, c_int64) for name in ("count", "num_proposed")),
        ("tokens", c_int64 * MOST_CANDIDATES),
        *((name, c_double * MOST_CANDIDATES) for name in ("confidences", "draws")),
        ("proposed_tokens", c_int64 * MOST_CANDIDATES),
        ("proposed_probs", c_double * MOST_CANDIDATES),
    ]


class CandidatesCall(ctypes.Structure):
    """Rows to find candidates of, csrc/draw.h."""

    _fields_ = [
        ("logits", c_void_p),
        *((name, c_int64) for name in ("rows", "vocab")),
        *((name, c_char_p) for name in ("params", "seen", "lanes")),
        ("most", c_int64),
        ("out", POINTER(CandidatesRow)),
    ]


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "pl_isa": (c_char_p, []),
    "pl_use_isa": (c_int, [c_char_p]),
    "pl_threads": (c_int, []),
    "pl_set_threads": (None, [c_int]),
    "pl_rms_norm": (None, [c_void_p, c_void_p, c_float, c_int, c_int, c_void_p]),
    "pl_rotate": (None, [c_void_p, c_void_p, c_void_p, c_int, c_int, c_int]),
    "pl_linear_new": (c_void_p, [c_int, c_void_p, c_int, c_int, c_int, c_void_p, c_int]),
    "pl_linear_free": (None, [c_void_p]),
    "pl_linear": (None, [c_void_p, c_void_p, c_int, c_int, c_void_p]),
    "pl_attention": (
        None,
        [
            *(POINTER(AttentionShape), c_void_p, c_int64, POINTER(Batch)),
            *(c_void_p, c_void_p, c_int),
        ],
    ),
    "pl_draw": (None, [POINTER(DrawCall)]),
    "pl_candidates": (None, [POINTER(CandidatesCall)]),
    "pl_likeliest": (None, [c_void_p, c_int64, c_char_p, c_int64, c_int64, c_void_p]),
    "pl_decoder_new": (c_void_p, [POINTER(DecoderConfig)]),
    "pl_decoder_free": (None, [c_void_p]),
    "pl_decoder_layer": (
        None,
        [c_void_p, POINTER(DecoderConfig), c_int, POINTER(LayerPointers)],
    ),
    "pl_decoder_ends": (
        None,
        [c_void_p, POINTER(DecoderConfig), POINTER(Source), POINTER(Source), c_void_p],
    ),
    "pl_decoder_forward": (None, [c_void_p, POINTER(Step), c_void_p]),
    "pl_decoder_logits": (None, [c_void_p, c_void_p, c_void_p, c_int, c_void_p]),
    "pl_drop_file_pages": (None, [c_void_p, c_size_t]),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the loaded library, or None with one warning that says why not."""
    wanted = os.environ.get(KERNELS_VARIABLE, "")
    if wanted == "reference":
        return None
    if not _PATH.exists():
        logger.warning("C++ kernels are not built, torch is used: make setup builds them")
        return None
    try:
        loaded = ctypes.CDLL(str(_PATH))
        loaded.pl_interface.restype = c_int
        interface = loaded.pl_interface()
    except (OSError, AttributeError) as error:
        logger.warning("C++ kernels cannot be loaded, torch is used: %s", error)
        return None
    if interface != _INTERFACE:
        logger.warning("C++ kernels are of another version, torch is used: make setup rebuilds")
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    if wanted and loaded.pl_use_isa(wanted.encode()):
        raise ValueError(f"{KERNELS_VARIABLE}={wanted}: this machine cannot run it")
    return loaded


def backend() -> str:
    """Name what computes here: an instruction set, or "reference"."""
    loaded = library()
    return "reference" if loaded is None else loaded.pl_isa().decode()


@functools.cache
def build_id() -> str:
    """Name the library's content, so that what was measured of one build is not held for true
    of another; "" without one."""
    if library() is None:
        return ""
    return hashlib.blake2b(_PATH.read_bytes(), digest_size=8).hexdigest()


def threads() -> int:
    """Return how many threads what the calling thread makes from now on uses."""
    loaded = library()
    return 1 if loaded is None else int(loaded.pl_threads())


def set_threads(threads: int) -> None:
    """Use so many threads for what the calling thread makes from now on."""
    loaded = library()
    if loaded is not None:
        loaded.pl_set_threads(threads)
