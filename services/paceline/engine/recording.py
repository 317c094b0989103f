"""Records the distributions that a step's tokens were drawn from, for samples to train with.

Only for the rows that the plan names, and only at the places whose draw was emitted: a row's last
token and the accepted nodes of its draft. runner.py calls this file behind drawing.py.
Shape legend: M places that were drawn at, P of them recorded, V vocabulary, K tokens named,
E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from paceline.engine.kernels import Likeliest, has_cpp_kernels, likeliest
from paceline.engine.step import Captured, RowResult, StepPlan


def record(
    plan: StepPlan,
    results: Sequence[RowResult],
    logits_MV: torch.Tensor,
    hidden: Callable[[torch.Tensor], torch.Tensor],
) -> list[RowResult]:
    """Return the results with `captured` set on those rows that brought tokens.

    Args:
        plan: names the rows.
        results: what was drawn, row for row.
        logits_MV: float32, of the model alone: nothing of the requests' sampling is in them.
        hidden: returns final hidden states [P, E] of so many of the step's tokens, by index.
    """
    wanted = plan.captured.sequence_ids
    recorded: list[int] = []
    places: list[int] = []
    tokens: list[int] = []
    # A row's logits begin at `at_logits`, its last token lies at `at_root`.
    at_logits = end = 0
    for i, (row, result) in enumerate(zip(plan.rows, results, strict=True)):
        end += row.num_tokens
        if row.sample is None:
            continue
        if row.sequence_id in wanted and result.tokens:
            at_root = end - len(row.tree) - 1
            drawn = [0, *[node + 1 for node in result.path]]
            recorded.append(i)
            places += [at_logits + place for place in drawn]
            tokens += [at_root + place for place in drawn]
        at_logits += 1 + len(row.tree)
    added = list(results)
    if not recorded:
        return added
    top = plan.captured.top
    found = name_likeliest(logits_MV, places, top)
    hidden_PE = None
    if plan.captured.hidden:
        hidden_PE = hidden(torch.tensor(tokens)).to(torch.float16).numpy()
    begin = 0
    for i in recorded:
        result = results[i]
        end = begin + len(result.tokens)
        captured = Captured(
            num_tokens=end - begin,
            top_ids=found.ids_PK[4 * top * begin : 4 * top * end],
            top_probs=found.probs_PK[2 * top * begin : 2 * top * end],
            tail_mass=found.tail_P[2 * begin : 2 * end],
            hidden=b"" if hidden_PE is None else hidden_PE[begin:end].tobytes(),
        )
        # In less than half the time of `replace`.
        added[i] = RowResult(
            result.tokens, result.path, result.successors, result.hidden_E, captured
        )
        begin = end
    return added


def name_likeliest(logits_MV: torch.Tensor, places: Sequence[int], top: int) -> Likeliest:
    """Name the K = `top` likeliest tokens at temperature 1 of P rows; `top` is at most V.

    For a row of 8,192 tokens the kernel takes 6 us and torch 64; of 49,152, 16 and 216 us.
    """
    if has_cpp_kernels():
        return likeliest(logits_MV, places, top)
    logits_PV = logits_MV[torch.tensor(places)]
    best = logits_PV.topk(top, dim=-1)
    probs_PK = (best.values - logits_PV.logsumexp(dim=-1, keepdim=True)).exp().numpy()
    # Rounding can bring the sum above 1.
    tail_P = np.maximum(0.0, 1.0 - probs_PK.sum(axis=-1))
    return Likeliest(
        best.indices.numpy().astype("<i4").tobytes(),
        probs_PK.astype("<f2").tobytes(),
        tail_P.astype("<f2").tobytes(),
    )
