"""Draws a step's tokens by one call into the C++ kernels.

The rule is the engine's (`paceline.engine.sampling.reference`): the same token for the same
logits, parameters and key. Shape legend: R rows, V vocabulary, K wanted log-probabilities.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from paceline_kernels.cpu import library as lib


class DrawRow(NamedTuple):
    """How a row is drawn; fields as in `paceline.domain.request.SamplingParams`."""

    temperature: float
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stream: int
    position: int
    top_k: int
    num_logprobs: int
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    """Tokens that penalties count; empty where there are none. Reading them is what takes longer
    with the context: 13 ns a token and step."""


class Drawn(NamedTuple):
    """What was drawn, as lists."""

    tokens_R: list[int]
    """-1 for a row without a distribution: one with a NaN, or with nothing but -inf."""
    logprobs_R: list[float]
    best_tokens_RK: list[list[int]]
    best_logprobs_RK: list[list[float]]
    """Of the unmodified logits, best first; a row has as many as it wants and V allows."""


_ROW = struct.Struct("=6dQ7q")
"""DrawRow of csrc/draw.h. By way of numpy, packing a row takes 1 us instead of 0.3."""


def draw(logits_RV: torch.Tensor, rows: Sequence[DrawRow]) -> Drawn:
    """Draw a token for each row of float32 logits."""
    loaded = lib.library()
    if loaded is None:
        raise RuntimeError("C++ kernels are not available")
    if logits_RV.dtype != torch.float32 or len(rows) != len(logits_RV):
        raise ValueError(f"{len(rows)} rows of float32 logits, not {logits_RV.shape}")
    logits_RV = logits_RV.contiguous()
    params, seen = pack_rows(rows)
    num_rows, vocab = logits_RV.shape
    most = min(max((row.num_logprobs for row in rows), default=0), vocab)
    tokens_R, logprobs_R = np.empty(num_rows, np.int64), np.empty(num_rows, np.float32)
    best_tokens_RK = np.empty((num_rows, most), np.int64)
    best_logprobs_RK = np.empty((num_rows, most), np.float32)
    call = lib.DrawCall(
        *(logits_RV.data_ptr(), num_rows, vocab, params, seen, most),
        *(array.ctypes.data for array in (tokens_R, logprobs_R, best_tokens_RK, best_logprobs_RK)),
    )
    loaded.pl_draw(call)
    lengths_R = [row.num_logprobs for row in rows]
    return Drawn(
        tokens_R.tolist(),
        logprobs_R.tolist(),
        [x_K[:n] for x_K, n in zip(best_tokens_RK.tolist(), lengths_R, strict=True)],
        [x_K[:n] for x_K, n in zip(best_logprobs_RK.tolist(), lengths_R, strict=True)],
    )


def pack_rows(rows: Sequence[DrawRow]) -> tuple[bytes, bytes]:
    """Lay the rows' numbers and the tokens they have seen out as csrc/draw.h reads them."""
    packed: list[bytes] = []
    seen: list[bytes] = []
    begin = 0
    for row in rows:
        num_prompt, num_output = len(row.prompt), len(row.output)
        packed.append(_ROW.pack(*row[:-2], begin, num_prompt, num_output))
        if num_prompt or num_output:
            seen += [np.fromiter(x, np.int64).tobytes() for x in (row.prompt, row.output)]
            begin += num_prompt + num_output
    return b"".join(packed), b"".join(seen)
