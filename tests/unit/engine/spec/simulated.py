"""A world to test the controller in: text that drafters foresee to a known degree, on a machine
with a known cost curve. Time is what that curve says.

A drafter sees a stack of candidates behind every token. Each candidate has a confidence, and is
right with the probability that the domain gives it, whatever the drafter believes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from paceline.domain.cost import Curve, StepCost, StepCurves, StepShape
from paceline.engine.spec.calibration import Calibration
from paceline.engine.spec.controller import OFF, Controller, Decision, Outcome, RowView
from paceline.engine.spec.drafter import DraftBudget
from paceline.engine.spec.drafters.best_first import grow
from paceline.engine.spec.tree import EMPTY_TREE, ROOT, DraftTree

CONTEXT = 300
FAR = 1000
"""Tokens that sequences still may bring."""
AUTO = "AUTO"


def cost_of(seconds: Mapping[int, float]) -> StepCost:
    """A machine whose steps take so long by tokens, and a little per row and token of context."""
    curves = StepCurves(
        tokens=Curve(tuple(seconds), tuple(seconds.values())),
        rows=Curve((0, 1, 32), (0.0, 0.4e-3, 1.1e-3)),
        contexts=Curve((0, 32768), (0.0, 5.4e-3)),
        prefill_row_s=0.0,
        prefill_read_s=0.0,
        prefill_context_s=0.0,
        nodes=Curve((0, 1, 16, 32), (0.0, 0.06e-3, 0.44e-3, 0.8e-3)),
        node_context_s=6e-8,
    )
    return StepCost(seconds[1], 0.0, 0.0, 0.0, curves)


MEMORY_BOUND = cost_of({1: 10e-3, 16: 10.4e-3, 32: 10.9e-3, 64: 12e-3, 128: 20e-3, 256: 40e-3})
"""A GPU: tokens are nearly free up to some 64."""
SMALL_CPU = cost_of({1: 0.69e-3, 2: 0.69e-3, 8: 0.76e-3, 16: 1.2e-3, 32: 2.35e-3, 64: 4.55e-3})
"""Measured: a small model in bfloat16 on two cores."""
COMPUTE_BOUND = cost_of({1: 2e-3, 64: 128e-3})
"""Every token costs as much as the first."""
TILES = cost_of({1: 5e-3, 16: 5e-3, 17: 8e-3, 32: 8e-3, 33: 11e-3, 48: 11e-3, 49: 14e-3, 64: 14e-3})
"""Tokens are computed sixteen at a time."""

ARMS = ("trie", "recycling", "model", "trie+model")


@dataclass(frozen=True)
class Skill:
    """How a drafter does on a kind of text."""

    right: float
    """How often the first candidate is the target's token."""
    believed: float
    """Confidence of the first candidate."""
    speaks: float = 1.0
    """How often there is anything to say."""
    second: float = 0.0
    """How often the second candidate is right instead."""


SILENT = Skill(0.0, 0.0, speaks=0.0)

SKILLS: Mapping[str, Mapping[str, Skill]] = {
    "trie": {
        "json": Skill(0.9, 0.7, speaks=0.9),
        "code": Skill(0.8, 0.8, speaks=0.5),
        "prose": Skill(0.3, 0.6, speaks=0.2),
        "random": Skill(0.0, 0.5, speaks=0.5),
    },
    "recycling": {
        "json": Skill(0.5, 0.5, second=0.2),
        "code": Skill(0.45, 0.5, second=0.2),
        "prose": Skill(0.35, 0.4, second=0.15),
        "random": Skill(0.0, 0.3),
    },
    "model": {
        "json": Skill(0.8, 0.8, second=0.1),
        "code": Skill(0.75, 0.7, second=0.1),
        "prose": Skill(0.7, 0.6, second=0.1),
        "random": Skill(0.0, 0.2),
    },
}
"""By drafter and text."""


def drafting_s(cost: StepCost) -> Callable[[str, int, int], float]:
    """Seconds by arm, sequences and levels: a model's pass takes 8 % of a step, for each level;
    looking up takes 20 us for each sequence."""
    pass_s = 0.08 * cost.step_s(StepShape(rows=1, attended=CONTEXT))

    def seconds(arm: str, sequences: int, levels: int) -> float:
        return sum(
            levels * pass_s * (1 + 0.02 * sequences)
            if part.startswith("model")
            else sequences * 20e-6
            for part in arm.split("+")
        )

    return seconds


class World:
    """Sequences that decode, one step after the other."""

    def __init__(
        self, cost: StepCost, seed: int = 0, skills: Mapping[str, Mapping[str, Skill]] = SKILLS
    ) -> None:
        self.cost = cost
        self.skills = skills
        self.texts: dict[int, str] = {}
        """Text by sequence, where it is not what its domain promises."""
        self._rng = Random(seed)
        self._draft_s = drafting_s(cost)
        self._seconds, self._tokens = 0.0, 0

    @property
    def rate(self) -> float:
        return self._tokens / self._seconds

    def reset(self) -> None:
        self._seconds, self._tokens = 0.0, 0

    def shape(self, rows: int, nodes: int = 0, prefill: int = 0) -> StepShape:
        shape = StepShape(rows, nodes, nodes * CONTEXT, rows * CONTEXT)
        return shape.with_chunk(prefill, 0) if prefill else shape

    def off_rate(self, rows: int) -> float:
        return rows / self.cost.step_s(self.shape(rows))

    def step(
        self, controller: Controller, rows: Sequence[RowView], prefill: int = 0
    ) -> list[Outcome]:
        """Run a step as the speculator does."""
        shape = self.shape(len(rows), 0, prefill)
        decisions = controller.plan(rows, shape)
        trees, draft_s = self._propose(rows, decisions)
        spent_s = sum(seconds for _, seconds in draft_s.values())
        trees = controller.prune(trees, rows, decisions, shape, spent_s)
        outcomes = [
            self._outcome(row, decision, tree)
            for row, decision, tree in zip(rows, decisions, trees, strict=True)
        ]
        controller.observe(outcomes, draft_s)
        self._count(outcomes, prefill, spent_s)
        return outcomes

    def fixed_step(self, arm: str, rows: Sequence[RowView], budget: DraftBudget) -> None:
        """Run a step in which every row drafts with one arm and the same budget."""
        nothing = Decision(OFF, "off")
        trees = [self._draft(arm, row, budget) for row in rows]
        outcomes = [
            self._outcome(row, nothing, tree) for row, tree in zip(rows, trees, strict=True)
        ]
        levels = max((max(tree.depths, default=1) for tree in trees), default=1)
        self._count(outcomes, 0, self._draft_s(arm, len(rows), levels))

    def _skill(self, part: str, row: RowView) -> Skill:
        return self.skills[part].get(self.texts.get(row.sequence_id, row.domain), SILENT)

    def _draft(self, arm: str, row: RowView, budget: DraftBudget) -> DraftTree:
        """What the arm proposes; a union proposes what its better part does."""
        part = max(arm.split("+"), key=lambda part: self._skill(part, row).right)
        skill = self._skill(part, row)
        if self._rng.random() >= skill.speaks:
            return EMPTY_TREE
        calibration = budget.part(part).calibration
        candidates = [(1, skill.believed, calibration.rate(skill.believed), None)]
        if skill.second:
            candidates.append((2, skill.second, calibration.rate(skill.second), None))
        return grow(budget, part, None, lambda _: candidates)

    def _outcome(self, row: RowView, decision: Decision, tree: DraftTree) -> Outcome:
        path: list[int] = []
        node, children = ROOT, tree.children()
        while node in children:
            skill = self._skill(tree.sources[0], row)
            drawn = self._rng.random()
            token = 1 if drawn < skill.right else 2 if drawn < skill.right + skill.second else 0
            child = next((c for c in children[node] if tree.tokens[c] == token), None)
            if child is None:
                break
            path.append(child)
            node = child
        return Outcome(row.sequence_id, decision, tree, tuple(path))

    def _propose(
        self, rows: Sequence[RowView], decisions: Sequence[Decision]
    ) -> tuple[list[DraftTree], dict[str, tuple[int, float]]]:
        trees = [EMPTY_TREE] * len(rows)
        levels: dict[str, list[int]] = {}
        for i, (row, decision) in enumerate(zip(rows, decisions, strict=True)):
            if decision.budget is not None:
                trees[i] = self._draft(decision.arm, row, decision.budget)
                levels.setdefault(decision.arm, []).append(max(trees[i].depths, default=1))
        return trees, {
            arm: (len(each), self._draft_s(arm, len(each), max(each)))
            for arm, each in levels.items()
        }

    def _count(self, outcomes: Sequence[Outcome], prefill: int, draft_s: float) -> None:
        nodes = sum(len(outcome.tree) for outcome in outcomes)
        self._seconds += self.cost.step_s(self.shape(len(outcomes), nodes, prefill)) + draft_s
        self._tokens += sum(len(outcome.path) + 1 for outcome in outcomes)


def rows_of(domains: Sequence[str], first_id: int = 0) -> list[RowView]:
    return [RowView(first_id + i, domain, AUTO, FAR) for i, domain in enumerate(domains)]


def best_fixed_rate(cost: StepCost, domains: Sequence[str], steps: int) -> float:
    """The best of all arms with a constant number of nodes and depth, and of no drafts."""
    rates = [World(cost).off_rate(len(domains))]
    for arm in ARMS:
        for nodes in (1, 2, 4, 8, 16):
            for depth in (1, 2, 4, 8):
                if depth <= nodes:
                    rates.append(_fixed_rate(cost, arm, domains, nodes, depth, steps))
    return max(rates)


def _fixed_rate(
    cost: StepCost, arm: str, domains: Sequence[str], nodes: int, depth: int, steps: int
) -> float:
    world = World(cost, seed=1)
    calibrations = {part: Calibration() for part in SKILLS}
    budget = DraftBudget(nodes, depth, 0.0, Calibration(), calibrations.__getitem__)
    for _ in range(steps):
        world.fixed_step(arm, rows_of(domains), budget)
    return world.rate
