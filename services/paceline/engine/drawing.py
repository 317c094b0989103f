"""Draws the tokens behind a step's rows, and keeps of each draft what the target agrees with.

A row with a draft has logits at its last token and at every node; each is drawn from as if the
path to it were the sequence. Which nodes that accepts is spec/verify.py's. runner.py calls this
file with the step's logits. Shape legend: M places to draw at, row after row; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from paceline.engine.sampling import reference
from paceline.engine.sampling.distribution import probabilities
from paceline.engine.sampling.noise import verifier_uniforms
from paceline.engine.sampling.sampler import sample
from paceline.engine.spec.tree import ROOT, DraftTree
from paceline.engine.spec.verify import Floats, Verdict, verify_coupled, verify_rejection
from paceline.engine.step import NOTHING, Row, RowResult, SampledToken, SampleSpec

_NONE = -1
"""Stands for the token of a place that has no distribution; no node has it."""


def draw(rows: Sequence[Row], logits_MV: torch.Tensor, num_successors: int) -> list[RowResult]:
    """Return what each row brings; rows that are drawn from and bring no token have failed.

    Args:
        rows: the step's rows; M counts 1 + nodes for each that has a sample.
        logits_MV: float32.
        num_successors: how many of the likeliest next tokens to report at each place.
    """
    specs = [spec for row in rows if row.sample is not None for spec in place_specs(row)]
    drawn_M = sample(logits_MV, specs)
    successors_M: list[list[int]] | None = None
    if num_successors:
        count = min(num_successors, logits_MV.shape[1])
        successors_M = logits_MV.topk(count, dim=-1).indices.tolist()
    results: list[RowResult] = []
    begin = 0
    for row in rows:
        if row.sample is None:
            results.append(NOTHING)
            continue
        places = slice(begin, begin + 1 + len(row.tree))
        begin = places.stop
        result = None
        if row.tree.proposals:
            result = _rejected(row.tree, logits_MV[places], specs[places])
        if result is None:
            result = _coupled(row.tree, drawn_M[places])
        if successors_M is not None and result.tokens:
            result = replace(result, successors=successors_M[places])
        results.append(result)
    return results


def place_specs(row: Row) -> list[SampleSpec]:
    """Return how to draw at a row's last token and at each node of its draft.

    A node's draw has the noise and the penalties of its path.
    """
    spec, tree = row.sample, row.tree
    assert spec is not None
    specs = [spec]
    for node, depth in enumerate(tree.depths):
        output = spec.output_token_ids
        if output is not None:
            output += tuple([tree.tokens[i] for i in tree.path_to(node)])
        specs.append(
            SampleSpec(
                *(spec.sampling, spec.stream, spec.position + depth, spec.num_logprobs),
                *(spec.prompt_token_ids, output),
            )
        )
    return specs


def _coupled(tree: DraftTree, drawn: Sequence[SampledToken | None]) -> RowResult:
    if not tree.tokens:
        return NOTHING if drawn[0] is None else RowResult((drawn[0],))
    verdict = verify_coupled(tree, [_NONE if token is None else token.token_id for token in drawn])
    if verdict.token == _NONE:
        if not verdict.path:
            return NOTHING
        # The place behind the path has no distribution. Without a draft that would show one step
        # later: the last node's token is what was drawn in front of it.
        verdict = Verdict(verdict.path[:-1], tree.tokens[verdict.path[-1]])
    places = [ROOT, *verdict.path]
    tokens = [drawn[place + 1] for place in places]
    return RowResult(tuple([token for token in tokens if token is not None]), verdict.path)


def _rejected(
    tree: DraftTree, logits_PV: torch.Tensor, specs: Sequence[SampleSpec]
) -> RowResult | None:
    """Verify by recursive rejection; None where a place on the way has no distribution."""

    def target(node: int) -> Floats:
        probs_1V = probabilities(logits_PV[node + 1 : node + 2], [specs[node + 1]])
        return np.asarray(probs_1V[0].numpy())

    most = max(map(len, tree.children().values()))
    uniforms_PK = verifier_uniforms(specs[0], 1 + max(tree.depths), 1 + most)
    try:
        verdict = verify_rejection(tree, target, uniforms_PK)
    except ValueError:
        return None
    places = [ROOT, *verdict.path]
    tokens = [*(tree.tokens[node] for node in verdict.path), verdict.token]
    return RowResult(
        tuple(
            SampledToken(token, reference.logprobs(logits_PV[place + 1], specs[place + 1], token))
            for place, token in zip(places, tokens, strict=True)
        ),
        verdict.path,
    )
