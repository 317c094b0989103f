"""Finds what a draft proposes behind each of some rows by one call into the C++ kernels.

The rule is the engine's (`paceline.engine.spec.candidates_reference`). Shape legend: R rows,
V vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from paceline_kernels.cpu import library as lib
from paceline_kernels.cpu.sampling import DrawRow, pack_rows

_GUESS = -1
_COUNTS = struct.Struct("=2q")
_INTEGERS = tuple(struct.Struct(f"={n}q") for n in range(lib.MOST_CANDIDATES + 1))
_DOUBLES = tuple(struct.Struct(f"={n}d") for n in range(lib.MOST_CANDIDATES + 1))
"""By length. Arrays of a few numbers become tuples in half the time that numpy takes."""
_TOKENS, _CONFIDENCES, _DRAWS, _PROPOSED_TOKENS, _PROPOSED_PROBS = (
    getattr(lib.CandidatesRow, name).offset
    for name in ("tokens", "confidences", "draws", "proposed_tokens", "proposed_probs")
)


class Found(NamedTuple):
    """What is proposed behind one node; nothing where a row is not finite."""

    tokens: tuple[int, ...]
    """In order of trial."""
    confidences: tuple[float, ...]
    draws: tuple[float, ...] = ()
    """Perturbed log-probabilities of tokens that the draft drew itself; empty for guesses."""
    proposed_tokens: tuple[int, ...] = ()
    proposed_probs: tuple[float, ...] = ()
    """What they were drawn from."""


def find_candidates(
    logits_RV: torch.Tensor, rows: Sequence[DrawRow], lanes: Sequence[int | None], count: int
) -> list[Found]:
    """Find at most `count` candidates, and 64, for each row of float32 logits.

    A lane is the noise that a row's own draws take; without one it guesses what the target
    draws. Greedy rows always guess. `num_logprobs` is ignored.
    """
    loaded = lib.library()
    if loaded is None:
        raise RuntimeError("C++ kernels are not available")
    if logits_RV.dtype != torch.float32 or not len(rows) == len(lanes) == len(logits_RV):
        raise ValueError(f"{len(rows)} rows of float32 logits, not {logits_RV.shape}")
    if count < 1:
        raise ValueError(f"{count} candidates")
    logits_RV = logits_RV.contiguous()
    num_rows, vocab = logits_RV.shape
    params, seen = pack_rows(rows)
    out_R = (lib.CandidatesRow * num_rows)()
    call = lib.CandidatesCall(
        *(logits_RV.data_ptr(), num_rows, vocab, params, seen),
        struct.pack(f"={num_rows}q", *[_GUESS if lane is None else lane for lane in lanes]),
        *(min(count, lib.MOST_CANDIDATES), out_R),
    )
    loaded.pl_candidates(call)
    return [_unpack(out) for out in out_R]


def _unpack(out: lib.CandidatesRow) -> Found:
    count, num_proposed = _COUNTS.unpack_from(out)
    integers, doubles = _INTEGERS[count].unpack_from, _DOUBLES[count].unpack_from
    if num_proposed == 0:
        return Found(integers(out, _TOKENS), doubles(out, _CONFIDENCES))
    return Found(
        integers(out, _TOKENS),
        doubles(out, _CONFIDENCES),
        doubles(out, _DRAWS),
        _INTEGERS[num_proposed].unpack_from(out, _PROPOSED_TOKENS),
        _DOUBLES[num_proposed].unpack_from(out, _PROPOSED_PROBS),
    )
