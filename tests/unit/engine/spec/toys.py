"""Toy models whose outputs are enumerated: every tree that can be drawn, every verdict on it.

A model is a function of the tokens so far. Nothing here draws or rounds: probabilities of
trees, verdicts and outputs are multiplied out.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from paceline.engine.spec.builders import Growth
from paceline.engine.spec.calibration import Calibration
from paceline.engine.spec.drafter import DraftBudget
from paceline.engine.spec.growth import Candidates, TreeBuilder
from paceline.engine.spec.tree import ROOT, DraftTree, Proposal
from paceline.engine.spec.verify import Floats, Residual

Path = tuple[int, ...]
Model = Callable[[Path], Floats]
Outputs = dict[Path, float]
Trees = list[tuple[float, DraftTree]]


def random_model(seed: int, vocab: int, sharpness: float = 1.5) -> Model:
    """A distribution of its own behind every path."""

    def behind(path: Path) -> Floats:
        weights = np.exp(sharpness * np.random.default_rng((seed, *path)).normal(size=vocab))
        return np.asarray(weights / weights.sum())

    return behind


def budget_of(nodes: int, depth: int, threshold: float = 0.0) -> DraftBudget:
    return DraftBudget(nodes, depth, threshold, Calibration())


def path_tokens(tree: DraftTree, node: int) -> Path:
    return tuple(tree.tokens[n] for n in tree.path_to(node))


def proposal_of(probs: Floats) -> Proposal:
    support = np.flatnonzero(probs)
    return Proposal(tuple(support.tolist()), tuple(probs[support].tolist()), 0)


def draws_without_replacement(probs: Floats, count: int) -> Iterator[tuple[float, Path]]:
    """Every sequence of `count` tokens (or as many as there are) with its probability."""
    support = np.flatnonzero(probs).tolist()
    for tokens in itertools.permutations(support, min(count, len(support))):
        weight, left = 1.0, 1.0
        for token in tokens:
            weight *= probs[token] / left
            left -= probs[token]
        yield weight, tokens


def grown(builder: TreeBuilder, budget: DraftBudget, draft: Model, *counts: int) -> Trees:
    """Every tree that the builder makes of so many draws behind each node, by level."""
    weights: Counter[tuple[Path, Path]] = Counter()
    trees: dict[tuple[Path, Path], DraftTree] = {}
    first = builder.start(budget, "toy")
    assert isinstance(first, Growth)
    for weight, tree in _expanded(first, {ROOT: ()}, draft, counts, 1.0):
        # Trees that differ in draws that were not kept are one.
        weights[tree.tokens, tree.parents] += weight
        trees[tree.tokens, tree.parents] = tree
    return [(weight, trees[key]) for key, weight in weights.items()]


def _expanded(
    growth: Growth, paths: dict[int, Path], draft: Model, counts: Path, weight: float
) -> Iterator[tuple[float, DraftTree]]:
    frontier = growth.frontier()
    if not frontier:
        yield weight, growth.tree()
        return
    proposals = [draft(paths[node]) for node in frontier]
    count = counts[min(growth.level, len(counts) - 1)]
    choices = [list(draws_without_replacement(probs, count)) for probs in proposals]
    for combination in itertools.product(*choices):
        further = copy.copy(growth)
        further.nodes, further._proposals = list(growth.nodes), dict(growth._proposals)
        further.expand(
            [
                Candidates(tokens, tuple(probs[list(tokens)].tolist()), (), proposal_of(probs))
                for (_, tokens), probs in zip(combination, proposals, strict=True)
            ]
        )
        known = dict(paths)
        for node, slot in enumerate(further.nodes):
            known[node] = (*known[slot.parent], slot.token)
        chance = weight * float(np.prod([w for w, _ in combination]))
        yield from _expanded(further, known, draft, counts, chance)


def verdicts(tree: DraftTree, target: Model) -> Iterator[tuple[float, Path]]:
    """What `verify_rejection` emits for a tree, with its probability over the uniforms."""
    children = tree.children()

    def at(node: int, path: Path, weight: float) -> Iterator[tuple[float, Path]]:
        residual = Residual(target(path), tree.proposals.get(node))
        for child in children.get(node, ()):
            token = tree.tokens[child]
            chance = residual.acceptance(token)
            if chance > 0.0:
                yield from at(child, (*path, token), weight * chance)
            weight *= 1.0 - chance
            if weight < 1e-15 or not residual.refuse(token):
                return
        for token, probability in enumerate(residual.probs_V):
            yield weight * float(probability), (*path, token)

    yield from at(ROOT, (), 1.0)


def outputs_of(trees: Trees, target: Model, length: int) -> Outputs:
    """The distribution of the first `length` tokens; what a verdict lacks the target draws."""
    emitted: Counter[Path] = Counter()
    for weight, tree in trees:
        for chance, path in verdicts(tree, target):
            emitted[path] += weight * chance
    outputs: Counter[Path] = Counter()
    for path, weight in emitted.items():
        for rest, chance in continuations(target, path, length):
            outputs[rest[:length]] += weight * chance
    return dict(outputs)


def continuations(target: Model, path: Path, length: int) -> Iterator[tuple[Path, float]]:
    """The target's own outputs behind a path, up to `length` tokens in all."""
    if len(path) >= length:
        yield path, 1.0
        return
    for token, chance in enumerate(target(path).tolist()):
        for rest, further in continuations(target, (*path, token), length):
            yield rest, chance * further


def total_variation(outputs: Outputs, target: Model, length: int) -> float:
    """Distance to what the target emits by itself."""
    own = dict(continuations(target, (), length))
    assert abs(sum(outputs.values()) - 1.0) < 1e-9
    return 0.5 * sum(abs(outputs.get(p, 0.0) - own.get(p, 0.0)) for p in own | outputs)


def mean_accepted(trees: Trees, target: Model) -> float:
    """Expected number of accepted tokens."""
    return sum(
        weight * chance * (len(path) - 1)
        for weight, tree in trees
        for chance, path in verdicts(tree, target)
    )


def truncated(draft: Model, num: int) -> Model:
    """The draft's `num` likeliest tokens only."""

    def behind(path: Path) -> Floats:
        probs = draft(path)
        kept = np.where(probs >= np.sort(probs)[-num], probs, 0.0)
        return np.asarray(kept / kept.sum())

    return behind


def with_point_masses(tree: DraftTree, token_of: Callable[[Path, Sequence[int]], int]) -> DraftTree:
    """Add a child to every node of a tree that has some; it may depend on those before it."""
    tokens, parents = list(tree.tokens), list(tree.parents)
    for node, siblings in tree.children().items():
        tokens.append(token_of(path_tokens(tree, node), [tree.tokens[s] for s in siblings]))
        parents.append(node)
    filler = (0.5,) * (len(tokens) - len(tree))
    return replace(
        tree,
        tokens=tuple(tokens),
        parents=tuple(parents),
        confidences=tree.confidences + filler,
        values=tree.values + filler,
        sources=("toy",) * len(tokens),
    )
