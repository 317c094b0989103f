"""Makes a step's rows from sequences. Nothing here grows with the context, penalties aside.

scheduler.py decides how many tokens of which sequence; this file says what the runner gets.
"""

from __future__ import annotations

from paceline.engine.request import Sequence
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree
from paceline.engine.step import Row, SampleSpec


def build_row(sequence: Sequence, count: int, tree: DraftTree = EMPTY_TREE) -> Row:
    """Return the row that computes the next `count` tokens of a sequence and a draft behind."""
    start, tokens = sequence.num_computed, sequence.token_ids
    end = start + count
    return Row(
        sequence_id=sequence.id,
        token_ids=(tokens[start],) if count == 1 else tuple(tokens[start:end]),
        start=start,
        pages=sequence.pages.ids,
        # A leader's target is one short of this, so nothing is drawn for it.
        sample=_sample_spec(sequence) if end == len(tokens) else None,
        tree=tree,
    )


def _sample_spec(sequence: Sequence) -> SampleSpec:
    spec, tokens = sequence.request.spec, sequence.token_ids
    has_penalties = spec.sampling.has_penalties
    return SampleSpec(
        sampling=spec.sampling,
        stream=sequence.index,
        position=len(tokens),
        num_logprobs=spec.logprobs,
        prompt_token_ids=spec.prompt_token_ids if has_penalties else None,
        output_token_ids=tuple(tokens[sequence.num_prompt :]) if has_penalties else None,
    )
