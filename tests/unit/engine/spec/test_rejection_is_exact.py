"""Recursive rejection leaves the target's distribution as it is: proven by enumeration.

All trees that a builder can draw and all verdicts on them are summed up, so distances are
zero but for rounding. Two wrong ways to draft are caught, so the proof can fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from paceline.domain.request import SamplingParams
from paceline.engine.sampling.distribution import probabilities
from paceline.engine.spec.builders import BUILDERS, branching
from paceline.engine.spec.drafter import DraftBudget
from paceline.engine.spec.growth import TreeBuilder
from paceline.engine.spec.tree import EMPTY_TREE, ROOT, DraftTree
from paceline.engine.spec.verify import Floats
from paceline.engine.step import SampleSpec
from tests.unit.engine.spec.toys import (
    Model,
    Path,
    Trees,
    budget_of,
    grown,
    mean_accepted,
    outputs_of,
    proposal_of,
    random_model,
    total_variation,
    truncated,
    with_point_masses,
)

EXACT = 1e-9

SHAPES: dict[str, tuple[TreeBuilder, DraftBudget, int, tuple[int, ...]]] = {
    # builder, budget, vocabulary, draws behind a node by level
    "chain": (BUILDERS["chain"](), budget_of(3, 3), 4, (1,)),
    "a chain that stops where it is not worth it": (
        BUILDERS["chain"](),
        budget_of(3, 3, 0.3),
        4,
        (1,),
    ),
    "rsd-c": (branching(2, 2), budget_of(6, 2), 4, (2,)),
    "rsd-c that runs out of nodes": (branching(2, 2), budget_of(4, 2), 4, (2,)),
    "three of five": (branching(3, 1), budget_of(6, 2), 5, (3, 1)),
    "static": (BUILDERS["static"](), budget_of(5, 2), 4, (4, 1)),
    "dynamic": (BUILDERS["dynamic"](), budget_of(4, 3), 3, (2,)),
    "dynamic by threshold": (BUILDERS["dynamic"](), budget_of(99, 2, 0.25), 4, (3, 2)),
    "dynamic by both": (BUILDERS["dynamic"](), budget_of(4, 2, 0.1), 4, (3, 2)),
}


def drafted(name: str, draft: Model) -> Trees:
    builder, budget, _, counts = SHAPES[name]
    return grown(builder, budget, draft, *counts)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_drawn_trees(name: str) -> None:
    _, budget, vocab, _ = SHAPES[name]
    target, draft = random_model(1, vocab), random_model(2, vocab)
    trees = drafted(name, draft)
    assert len({tree.parents for _, tree in trees}) > 1 or "dynamic" not in name
    outputs = outputs_of(trees, target, budget.depth + 1)
    assert total_variation(outputs, target, budget.depth + 1) < EXACT


def test_drafts_cut_to_their_likeliest_tokens() -> None:
    target, draft = random_model(1, 5), truncated(random_model(2, 5), 3)
    trees = grown(branching(2, 1), budget_of(4, 2), draft, 2)
    assert total_variation(outputs_of(trees, target, 3), target, 3) < EXACT


def test_targets_that_exclude_tokens() -> None:
    target, draft = truncated(random_model(1, 5), 2), random_model(2, 5)
    trees = grown(branching(2, 1), budget_of(4, 2), draft, 2)
    assert total_variation(outputs_of(trees, target, 3), target, 3) < EXACT


def test_drafts_without_a_token_of_the_target_are_refused() -> None:
    def only(tokens: slice) -> Model:
        def behind(path: Path) -> Floats:
            probs = np.zeros(6)
            probs[tokens] = random_model(len(path), 3)(path)
            return probs

        return behind

    target, draft = only(slice(0, 3)), only(slice(3, 6))
    trees = grown(branching(2, 1), budget_of(4, 2), draft, 2)
    assert mean_accepted(trees, target) == 0.0
    assert total_variation(outputs_of(trees, target, 2), target, 2) < EXACT


def test_a_chain_drawn_from_the_target_is_always_accepted() -> None:
    target = random_model(1, 4)
    trees = grown(BUILDERS["chain"](), budget_of(3, 3), target, 1)
    assert mean_accepted(trees, target) == pytest.approx(3.0, abs=1e-12)
    assert total_variation(outputs_of(trees, target, 4), target, 4) < EXACT


def test_a_draft_of_the_whole_vocabulary_is_always_accepted() -> None:
    target, draft = random_model(1, 4), random_model(2, 4)
    trees = grown(branching(4), budget_of(4, 1), draft, 4)
    assert mean_accepted(trees, target) == pytest.approx(1.0, abs=1e-12)


def test_point_masses_alone() -> None:
    target, draft = random_model(1, 5), random_model(2, 5)
    best = np.argsort(-draft(())).tolist()[:3]
    tree = DraftTree(tokens=(*best, 1, 4), parents=(ROOT, ROOT, ROOT, 0, 0))
    outputs = outputs_of([(1.0, tree)], target, 3)
    assert total_variation(outputs, target, 3) < EXACT
    # Together they are accepted as often as the target has one of them.
    accepted = sum(outputs[p] for p in outputs if p[0] in best)
    assert accepted == pytest.approx(target(())[best].sum())


def test_point_masses_behind_drawn_children() -> None:
    target, draft = random_model(1, 4), random_model(2, 4)

    def token_of(path: Path, siblings: Sequence[int]) -> int:
        return max(t for t in range(4) if t not in siblings)

    trees = [
        (weight, with_point_masses(tree, token_of))
        for weight, tree in grown(branching(2, 1), budget_of(4, 2), draft, 2)
    ]
    assert total_variation(outputs_of(trees, target, 3), target, 3) < EXACT
    plain = grown(branching(2, 1), budget_of(4, 2), draft, 2)
    assert mean_accepted(trees, target) > mean_accepted(plain, target) + 0.05


def test_a_point_mass_that_was_drawn_before_does_no_harm() -> None:
    target, draft = random_model(1, 4), random_model(2, 4)
    trees = [
        (weight, with_point_masses(tree, lambda path, siblings: siblings[0]))
        for weight, tree in grown(branching(1), budget_of(1, 1), draft, 1)
    ]
    assert total_variation(outputs_of(trees, target, 2), target, 2) < EXACT


def test_trees_cut_by_their_values_afterwards() -> None:
    """What a controller does that has fewer nodes to give than were drafted."""
    target, draft = random_model(1, 4), random_model(2, 4)
    trees = [
        (weight, best_of(tree, 3))
        for weight, tree in grown(branching(2), budget_of(6, 2), draft, 2)
    ]
    assert len({tree.parents for _, tree in trees}) > 1
    assert total_variation(outputs_of(trees, target, 3), target, 3) < EXACT


def best_of(tree: DraftTree, num: int) -> DraftTree:
    kept = sorted(sorted(range(len(tree)), key=lambda n: -tree.values[n])[:num])
    place = {ROOT: ROOT, **{node: i for i, node in enumerate(kept)}}
    parents = tuple(place[tree.parents[node]] for node in kept)
    return DraftTree(
        tokens=tuple(tree.tokens[node] for node in kept),
        parents=parents,
        proposals={
            place[node]: replace(proposal, num_drawn=parents.count(place[node]))
            for node, proposal in tree.proposals.items()
            if node in place
        },
    )


def test_penalties_that_depend_on_the_path() -> None:
    logits = torch.randn((1, 4), generator=torch.Generator().manual_seed(5))
    params = SamplingParams(
        temperature=0.8, top_p=0.95, presence_penalty=1.5, repetition_penalty=1.3
    )

    @cache
    def target(path: Path) -> Floats:
        spec = SampleSpec(params, 0, len(path), 0, (2,), path)
        return np.asarray(probabilities(logits, [spec])[0].numpy())

    assert np.abs(target((0,)) - target((1,))).sum() > 0.2
    trees = grown(branching(2, 2), budget_of(6, 2), random_model(2, 4), 2)
    assert total_variation(outputs_of(trees, target, 3), target, 3) < EXACT


def test_an_empty_draft_leaves_the_target_alone() -> None:
    target = random_model(1, 4)
    assert total_variation(outputs_of([(1.0, EMPTY_TREE)], target, 1), target, 1) < EXACT


# -- what must be caught ----------------------------------------------------------------------


def skewed(behind: dict[int, float]) -> Model:
    probs = np.array([behind[token] for token in range(len(behind))])
    return lambda path: probs


TARGET = skewed({0: 0.1, 1: 0.3, 2: 0.6})
DRAFT = skewed({0: 0.6, 1: 0.3, 2: 0.1})


def test_siblings_sorted_by_probability_are_caught() -> None:
    def resorted(tree: DraftTree) -> DraftTree:
        order = sorted(range(len(tree)), key=lambda n: -tree.confidences[n])
        return replace(tree, tokens=tuple(tree.tokens[n] for n in order))

    trees = grown(branching(2), budget_of(2, 1), DRAFT, 2)
    assert total_variation(outputs_of(trees, TARGET, 1), TARGET, 1) < EXACT
    wrong = [(weight, resorted(tree)) for weight, tree in trees]
    assert total_variation(outputs_of(wrong, TARGET, 1), TARGET, 1) > 0.1


def test_likeliest_tokens_passed_off_as_drawn_are_caught() -> None:
    proposal = replace(proposal_of(DRAFT(())), num_drawn=2)
    tree = DraftTree(tokens=(0, 1), parents=(ROOT, ROOT), proposals={ROOT: proposal})
    assert total_variation(outputs_of([(1.0, tree)], TARGET, 1), TARGET, 1) > 0.1
    honest = replace(tree, proposals={})
    assert total_variation(outputs_of([(1.0, honest)], TARGET, 1), TARGET, 1) < EXACT


def test_draws_dropped_for_their_token_are_caught() -> None:
    def without(tree: DraftTree) -> DraftTree:
        return EMPTY_TREE if tree.tokens[0] == 0 else tree

    trees = grown(BUILDERS["chain"](), budget_of(1, 1), DRAFT, 1)
    wrong = [(weight, without(tree)) for weight, tree in trees]
    assert total_variation(outputs_of(wrong, TARGET, 1), TARGET, 1) > 0.1


def test_another_distribution_than_the_one_drawn_from_is_caught() -> None:
    trees = [
        (weight, replace(tree, proposals={ROOT: replace(proposal_of(DRAFT(())), num_drawn=1)}))
        for weight, tree in grown(BUILDERS["chain"](), budget_of(1, 1), truncated(DRAFT, 1), 1)
    ]
    assert total_variation(outputs_of(trees, TARGET, 1), TARGET, 1) > 0.1


# -- how much is accepted ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_drawn_chain_is_accepted_but_for_the_distance_of_the_models(seed: int) -> None:
    target, draft = random_model(seed, 6), random_model(seed + 100, 6)
    distance = 0.5 * float(np.abs(target(()) - draft(())).sum())
    trees = grown(BUILDERS["chain"](), budget_of(1, 1), draft, 1)
    assert mean_accepted(trees, target) == pytest.approx(1.0 - distance, abs=1e-12)


def test_each_further_draw_is_worth_something() -> None:
    target, draft = random_model(1, 5), random_model(2, 5)
    accepted = [
        mean_accepted(grown(branching(k), budget_of(k, 1), draft, k), target) for k in range(1, 6)
    ]
    assert accepted == sorted(accepted)
    assert accepted[0] + 0.1 < accepted[1]
    assert accepted[-1] == pytest.approx(1.0)
