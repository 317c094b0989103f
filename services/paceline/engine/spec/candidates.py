"""What a drafting model's logits propose: guesses of the target's draw, or draws of their own.

By the C++ kernels where they were built, in numpy otherwise; `candidates_reference` spells the
rule out. Called by drafters with a model, once per level of their trees.
Shape legend: M rows (nodes of all trees), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.engine.kernels import find_candidates, has_cpp_kernels
from paceline.engine.sampling.sampler import draw_row
from paceline.engine.spec import candidates_reference
from paceline.engine.spec.growth import Candidates
from paceline.engine.spec.tree import Proposal
from paceline.engine.step import SampleSpec


def candidates(
    logits_MV: torch.Tensor, specs: Sequence[SampleSpec], lanes: Sequence[int | None], count: int
) -> list[Candidates]:
    """Return possible children of each row's node, at most `count`, in order of trial.

    None at all for a row that is not finite.

    Args:
        logits_MV: float32, what the draft says behind the nodes.
        specs: how the target draws behind them: position and penalties are those of the path.
        lanes: `draft_lane` of the nodes whose children are to be drawn for recursive
            rejection, None for those that guess what the target draws with its own noise.
            Greedy rows are guesses always.
        count: the most children of a node, 1 to 64.
    """
    if not has_cpp_kernels():
        return candidates_reference.candidates(logits_MV, specs, lanes, count)
    rows: list[Candidates] = []
    for found in find_candidates(logits_MV, [draw_row(spec) for spec in specs], lanes, count):
        if not found.proposed_tokens:
            rows.append(Candidates(found.tokens, found.confidences))
        else:
            proposal = Proposal(found.proposed_tokens, found.proposed_probs, 0)
            rows.append(Candidates(found.tokens, found.confidences, found.draws, proposal))
    return rows
