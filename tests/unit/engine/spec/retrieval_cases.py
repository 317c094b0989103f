"""Sequences and budgets as drafters that look up see them, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.domain.request import SamplingParams
from paceline.engine.spec.calibration import Calibration
from paceline.engine.spec.drafter import DraftBudget, DraftContext, Round
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree

_SAMPLING = SamplingParams()


def context(
    sequence_id: int, token_ids: list[int], num_prompt: int, tenant: bytes = b"a"
) -> DraftContext:
    return DraftContext(sequence_id, tenant, token_ids, num_prompt, _SAMPLING, stream=0)


def budget(nodes: int = 16, depth: int = 8, threshold: float = 0.0) -> DraftBudget:
    return DraftBudget(nodes, depth, threshold, Calibration())


def emit(
    seen: DraftContext,
    tokens: Sequence[int],
    tree: DraftTree = EMPTY_TREE,
    successors: Sequence[Sequence[int]] | None = None,
) -> Round:
    """Append emitted tokens to a sequence, and return what a drafter is told of it."""
    assert isinstance(seen.token_ids, list)
    seen.token_ids.extend(tokens)
    return Round(seen, tree, (), tuple(tokens), successors)


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    """Return the tokens from the root's child down to each node."""
    return [tuple(tree.tokens[n] for n in tree.path_to(node)) for node in range(len(tree))]


def assert_well_formed(tree: DraftTree, limits: DraftBudget) -> None:
    """Check what every tree promises."""
    size = len(tree)
    lengths = {len(tree.parents), len(tree.confidences), len(tree.values), len(tree.sources)}
    assert lengths == {size} and size <= limits.nodes
    assert all(-1 <= parent < node for node, parent in enumerate(tree.parents))
    assert max(tree.depths, default=0) <= limits.depth
    assert len(set(paths(tree))) == size
    for node, parent in enumerate(tree.parents):
        assert 0.0 <= tree.confidences[node] <= 1.0
        assert limits.threshold <= tree.values[node] <= 1.0
        assert parent == -1 or tree.values[node] <= tree.values[parent] + 1e-12
