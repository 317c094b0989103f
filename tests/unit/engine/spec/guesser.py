"""A draft source that guesses: some of what will come, and much that will not."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from paceline.domain.cost import StepShape
from paceline.domain.learnings import SequenceOutcome
from paceline.engine import request
from paceline.engine.spec.drafter import NO_NEEDS, DrafterNeeds
from paceline.engine.spec.tree import ROOT, DraftTree
from paceline.engine.step import StepPlan, StepResult


class Guesser:
    """Proposes random trees over tokens that are known to come, wrong ones between them."""

    def __init__(
        self,
        future: Callable[[request.Sequence], Sequence[int]],
        vocab: int,
        *,
        seed: int = 0,
        max_nodes: int = 9,
        accuracy: float = 0.7,
        needs: DrafterNeeds = NO_NEEDS,
    ) -> None:
        """`future` says what comes behind a sequence's tokens, as far as it is known."""
        self._future, self._vocab = future, vocab
        self._rng = random.Random(seed)
        self._max_nodes, self._accuracy = max_nodes, accuracy
        self.needs = needs
        self.num_drafted = self.num_accepted = 0
        self.results: list[StepResult] = []
        self.forgotten: set[int] = set()

    def draft(
        self,
        sequences: list[request.Sequence],
        step: StepShape,
        reserve: Callable[[request.Sequence, int], int],
    ) -> Mapping[int, DraftTree]:
        assert step.rows >= len(sequences)
        trees = {}
        for sequence in sequences:
            size = reserve(sequence, self._rng.randint(0, self._max_nodes))
            # Some sequences of a step have no draft.
            if size and self._rng.random() < 0.8:
                trees[sequence.id] = self._grow(self._future(sequence), size)
        return trees

    def observe(
        self, plan: StepPlan, result: StepResult, sequences: list[request.Sequence]
    ) -> None:
        self.results.append(result)
        for row, brought in zip(plan.rows, result.rows, strict=True):
            self.num_drafted += len(row.tree)
            self.num_accepted += len(brought.path)

    def take_outcomes(self) -> list[SequenceOutcome]:
        return []

    def drafted_by(self, sequence_id: int) -> str:
        return "guess"

    def forget(self, sequence_id: int) -> None:
        self.forgotten.add(sequence_id)

    def _grow(self, future: Sequence[int], size: int) -> DraftTree:
        rng = self._rng
        tokens: list[int] = []
        parents: list[int] = []
        right: dict[int, int] = {ROOT: 0}
        """Node to the number of tokens of the future on its path."""
        for node in range(size):
            parent = rng.randint(ROOT, node - 1)
            if rng.random() < 0.5:
                parent = max(right, key=lambda n: right[n])
            known = right.get(parent)
            if known is not None and known < len(future) and rng.random() < self._accuracy:
                tokens.append(future[known])
                right[node] = known + 1
            else:
                tokens.append(rng.randrange(self._vocab))
            parents.append(parent)
        ones = (1.0,) * size
        return DraftTree(tuple(tokens), tuple(parents), ones, ones, ("guess",) * size)
