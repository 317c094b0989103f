"""Rejection with the noise that is really used: draws, beams, uniforms, and all of it together.

Seeds are fixed: a run is either right or wrong for ever.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from paceline.domain.request import SamplingParams
from paceline.engine.kernels import philox_uniform_at
from paceline.engine.sampling.noise import draft_lane, noise_keys, verifier_uniforms
from paceline.engine.spec.builders import BUILDERS, Growth, beam, branching
from paceline.engine.spec.candidates import candidates
from paceline.engine.spec.growth import Candidates, TreeBuilder
from paceline.engine.spec.tree import ROOT, DraftTree, Proposal
from paceline.engine.spec.verify import Floats, Residual, verify_rejection
from paceline.engine.step import SampleSpec
from tests.unit.engine.spec.toys import (
    Model,
    Path,
    Trees,
    budget_of,
    continuations,
    outputs_of,
    path_tokens,
    proposal_of,
    random_model,
    total_variation,
)

Score = Callable[[Growth], list[Path]]


def test_a_stochastic_beam_is_exact() -> None:
    """Beams compare draws of several parents, which enumeration cannot: trees are simulated,
    and what is emitted for each of them is computed exactly."""
    vocab, num = 3, 20_000
    target, draft = cache(random_model(1, vocab)), cache(random_model(2, vocab))
    rng = np.random.default_rng(0)
    gumbels = rng.gumbel(size=(num, 1 + 2, vocab))
    trees = counted([simulated(beam(2), draft, g) for g in gumbels])
    assert {tree.parents for _, tree in trees} == {(ROOT, ROOT, 0, 0), (ROOT, ROOT, 0, 1)}
    outputs = outputs_of(trees, target, 2)
    assert total_variation(outputs, target, 2) < 0.01
    # The same beams with their siblings turned round are not.
    wrong = [(weight, turned(tree)) for weight, tree in trees]
    assert total_variation(outputs_of(wrong, target, 2), target, 2) > 0.1


def simulated(builder: TreeBuilder, draft: Model, gumbels_NV: Floats) -> DraftTree:
    growth = builder.start(budget_of(4, 2), "toy")
    assert isinstance(growth, Growth)
    used = 0
    while frontier := growth.frontier():
        offered = []
        for node in frontier:
            probs = draft(path_of(growth, node))
            perturbed = np.log(probs) + gumbels_NV[used]
            order = np.argsort(-perturbed)
            used += 1
            offered.append(
                Candidates(
                    *(tuple(x[order].tolist()) for x in (np.arange(len(probs)), probs, perturbed)),
                    proposal_of(probs),
                )
            )
        growth.expand(offered)
    return growth.tree()


def path_of(growth: Growth, node: int) -> Path:
    slot = growth.nodes[node] if node != ROOT else None
    return (*path_of(growth, slot.parent), slot.token) if slot else ()


def counted(trees: list[DraftTree]) -> Trees:
    counts = Counter((tree.tokens, tree.parents) for tree in trees)
    one = {(tree.tokens, tree.parents): tree for tree in trees}
    return [(count / len(trees), one[key]) for key, count in counts.items()]


def turned(tree: DraftTree) -> DraftTree:
    """Siblings in the opposite order, with what hangs under them."""
    order: list[int] = []
    level = [ROOT]
    children = tree.children()
    while level:
        level = [child for node in level for child in reversed(children.get(node, []))]
        order += level
    place = {ROOT: ROOT, **{node: i for i, node in enumerate(order)}}
    return DraftTree(
        tokens=tuple(tree.tokens[node] for node in order),
        parents=tuple(place[tree.parents[node]] for node in order),
        proposals={place[node]: proposal for node, proposal in tree.proposals.items()},
    )


def test_candidates_are_drawn_without_replacement() -> None:
    num, vocab = 60_000, 5
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5, 2.0]).expand(num, vocab)
    params = SamplingParams(temperature=1.5, top_p=0.9)
    specs = [SampleSpec(replace(params, seed=seed), 0, 9, 0) for seed in range(num)]
    rows = candidates(logits, specs, [draft_lane(3, 2)] * num, 2)
    proposal = rows[0].proposal
    assert proposal is not None
    assert 2 not in proposal.tokens, "top-p cuts the draft"
    probs = dict(zip(proposal.tokens, proposal.probs, strict=True))
    assert sum(probs.values()) == pytest.approx(1.0)
    tempered = (logits[0] / 1.5).softmax(-1)
    assert probs[4] / probs[0] == pytest.approx(float(tempered[4] / tempered[0]), rel=1e-6)
    pairs = itertools.permutations(probs, 2)
    expected = {(a, b): probs[a] * probs[b] / (1 - probs[a]) for a, b in pairs}
    observed = Counter(row.tokens for row in rows)
    assert observed.keys() == expected.keys()
    distance = 0.5 * sum(abs(observed[p] / num - expected[p]) for p in expected)
    assert distance < 0.01


def test_lanes_are_strangers_to_each_other() -> None:
    """The target's, the verifier's and every node's noise of one position."""
    spec = SampleSpec(SamplingParams(seed=11), 0, 7, 0)
    lanes = [0, 1, *(draft_lane(node, depth) for node in range(-1, 30) for depth in range(6))]
    assert len(set(lanes)) == len(lanes)
    tokens = torch.arange(4000).expand(len(lanes), -1)
    keys = noise_keys([spec] * len(lanes))
    uniforms = philox_uniform_at(*keys, tokens, torch.tensor(lanes))
    correlation = torch.corrcoef(uniforms) - torch.eye(len(lanes))
    assert float(correlation.abs().max()) < 5.5 / 4000**0.5
    verifier = verifier_uniforms(replace(spec, position=5), 3, 8)
    assert verifier[2].tolist() == uniforms[1, :8].tolist()


def test_verdicts_follow_the_probabilities_of_their_children() -> None:
    """`verify_rejection` against the enumeration of what it is made of, at the root."""
    target, draft = random_model(10, 6)(()), random_model(2, 6)(())
    proposal = replace(proposal_of(draft), num_drawn=2)
    tree = DraftTree(tokens=(4, 5, 1), parents=(ROOT,) * 3, proposals={ROOT: proposal})
    residual, weight = Residual(target, proposal), 1.0
    expected: dict[str, float] = {}
    for node, token in enumerate(tree.tokens):
        chance = residual.acceptance(token)
        expected[f"node {node}"] = weight * chance
        weight *= 1 - chance
        assert residual.refuse(token)
    assert weight > 0.05, "the rest is reached"
    expected |= {f"token {t}": weight * p for t, p in enumerate(residual.probs_V.tolist())}
    num = 20_000
    uniforms = np.random.default_rng(1).random((num, 2, 4))
    verdicts = [verify_rejection(tree, lambda node: target, u) for u in uniforms]
    observed = Counter(f"node {v.path[0]}" if v.path else f"token {v.token}" for v in verdicts)
    assert sum(expected.values()) == pytest.approx(1.0)
    assert 0.5 * sum(abs(observed[k] / num - expected[k]) for k in expected | observed) < 0.01


@pytest.mark.parametrize("name", BUILDERS)
def test_all_parts_together_leave_the_distribution_alone(name: str) -> None:
    """Two rounds of real drafts and verdicts; the second drafts at positions of the first."""
    vocab, num, length = 3, 800, 3
    target, draft = cache(random_model(1, vocab, 1.0)), cache(random_model(2, vocab, 1.0))
    counts: Counter[Path] = Counter()
    accepted = 0
    for seed in range(num):
        output: Path = ()
        while len(output) < length:
            spec = SampleSpec(SamplingParams(seed=seed), 1, 20 + len(output), 0)
            tree = drafted(name, spec, lambda path, o=output: draft(o + path))
            path, token = verdict_of(tree, spec, lambda path, o=output: target(o + path))
            accepted += len(path)
            output = (*output, *path, token)
        counts[output[:length]] += 1
    expected = dict(continuations(target, (), length))
    chi2 = sum((counts[p] - num * e) ** 2 / (num * e) for p, e in expected.items())
    halves = torch.tensor([(len(expected) - 1) / 2, chi2 / 2], dtype=torch.float64)
    assert 1.0 - float(torch.special.gammainc(halves[0], halves[1])) > 1e-3
    assert accepted > num


def drafted(name: str, spec: SampleSpec, draft: Model) -> DraftTree:
    growth = BUILDERS[name]().start(budget_of(4, 2, 0.2), "toy")
    assert isinstance(growth, Growth)
    while frontier := growth.frontier():
        paths = [path_of(growth, node) for node in frontier]
        logits = torch.tensor(np.array([draft(path) for path in paths])).log().float()
        specs = [replace(spec, position=spec.position + len(path)) for path in paths]
        lanes = [draft_lane(n, len(p)) for n, p in zip(frontier, paths, strict=True)]
        growth.expand(candidates(logits, specs, lanes, 3))
    return growth.tree()


def verdict_of(tree: DraftTree, spec: SampleSpec, target: Model) -> tuple[Path, int]:
    most = max(map(len, tree.children().values()), default=0)
    uniforms = verifier_uniforms(spec, 1 + max(tree.depths, default=0), 1 + most)
    verdict = verify_rejection(tree, lambda node: target(path_tokens(tree, node)), uniforms)
    return tuple(tree.tokens[node] for node in verdict.path), verdict.token


# -- edges ------------------------------------------------------------------------------------


def proposal(*probs: float, drawn: int = 1) -> Proposal:
    return Proposal(tuple(range(len(probs))), probs, drawn)


def test_rounding_that_leaves_nothing_accepts() -> None:
    probs = np.array([0.3, 0.3, 0.4])
    residual = Residual(probs, proposal(*(probs * (1 + 1e-7)).tolist()))
    assert residual.acceptance(0) == pytest.approx(1.0)
    assert not residual.refuse(0)
    tree = DraftTree(tokens=(0,), parents=(ROOT,), proposals={ROOT: proposal(0.5, 0.5)})
    ones = np.full((2, 2), 1.0 - 2**-33)
    # The proposal is the target's distribution, and its sum is not quite 1.
    verdict = verify_rejection(tree, lambda node: np.array([0.5, 0.5 - 1e-12]), ones)
    assert verdict.path == (0,)


def test_a_proposal_that_is_used_up_leaves_point_masses() -> None:
    residual = Residual(np.array([0.2, 0.3, 0.5]), proposal(1.0, 0.0, 0.0, drawn=2))
    assert residual.acceptance(0) == pytest.approx(0.2)
    assert residual.refuse(0)
    assert residual.probs_V.tolist() == pytest.approx([0.0, 0.375, 0.625])
    assert residual.acceptance(1) == pytest.approx(0.375)
    assert residual.refuse(1)
    assert residual.probs_V.tolist() == [0.0, 0.0, 1.0]


def test_a_child_that_cannot_have_been_drawn_counts_as_a_point_mass() -> None:
    residual = Residual(np.array([0.2, 0.3, 0.5]), proposal(0.5, 0.5))
    assert residual.acceptance(2) == pytest.approx(0.5)
    assert residual.refuse(2)
    assert residual.probs_V.tolist() == pytest.approx([0.4, 0.6, 0.0])


def test_tokens_without_probability_are_never_drawn() -> None:
    residual = Residual(np.array([0.0, 0.5, 0.0, 0.5, 0.0]), None)
    draws = {residual.draw(u) for u in (2**-33, 0.25, 0.5, 0.75, 1 - 2**-33)}
    assert draws == {1, 3}


def test_a_target_without_a_distribution_is_an_error() -> None:
    with pytest.raises(ValueError, match="no distribution"):
        verify_rejection(DraftTree(), lambda node: np.full(3, np.nan), np.full((1, 1), 0.5))


def test_only_nodes_on_the_way_are_looked_at() -> None:
    asked: list[int] = []

    def target(node: int) -> Floats:
        asked.append(node)
        return np.array([1.0, 0.0])

    tree = DraftTree(tokens=(1, 0, 0, 1, 0), parents=(ROOT, ROOT, 1, 1, 0))
    verdict = verify_rejection(tree, target, np.full((3, 3), 0.5))
    assert (verdict.path, verdict.token) == ((1, 2), 0)
    assert asked == [ROOT, 1, 2]


def test_greedy_targets_accept_their_best_token() -> None:
    tree = DraftTree(tokens=(2, 1), parents=(ROOT, ROOT))
    verdict = verify_rejection(
        tree, lambda node: np.eye(3)[1 if node == ROOT else 0], np.full((2, 3), 0.999)
    )
    assert (verdict.path, verdict.token) == ((1,), 0)


def test_branching_of_a_used_up_draft_has_fewer_children() -> None:
    rows = candidates(
        torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]]),
        [SampleSpec(SamplingParams(), 0, 1, 0)],
        [draft_lane(-1, 0)],
        4,
    )
    growth = branching(4).start(budget_of(4, 1), "toy")
    growth.expand(rows)
    tree = growth.tree()
    assert sorted(tree.tokens) == [0, 1]
    assert tree.proposals[ROOT].num_drawn == 2
