"""Counts what speculation brings, by arm, for the engine's report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from paceline.engine.spec.controller import OFF, Controller, Outcome
from paceline.engine.spec.drafter import Drafter
from paceline.engine.spec.report import DrafterReport, SpeculationReport
from paceline.engine.spec.tree import ROOT

MAX_DEPTH = 8
"""Depths that are told apart."""


@dataclass(slots=True)
class _Counts:
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    tried: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)
    kept: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)

    def add(self, outcome: Outcome) -> None:
        """Count a verified draft."""
        tree, path = outcome.tree, outcome.path
        self.rounds += 1
        self.drafted += len(tree)
        self.accepted += len(path)
        reached = (ROOT, *path)
        parents = set(tree.parents)
        for depth, node in enumerate(reached[:MAX_DEPTH]):
            # Whatever hangs under an accepted node was put to the test.
            self.tried[depth] += node in parents
            self.kept[depth] += depth < len(path)


class Tally:
    """Counts since the start."""

    def __init__(self, arms: Mapping[str, Drafter]) -> None:
        self._arms = arms
        self._counts = {arm: _Counts() for arm in arms}

    def add(
        self,
        outcomes: Sequence[Outcome],
        draft_s: Mapping[str, tuple[int, float]],
        observed_s: float,
    ) -> None:
        """Count a step; `observed_s` went into learning from it."""
        for outcome in outcomes:
            if outcome.decision.arm != OFF and outcome.tree.tokens:
                self._counts[outcome.decision.arm].add(outcome)
        for arm, (_, seconds) in draft_s.items():
            self._counts[arm].draft_s += seconds + observed_s / len(draft_s)

    def report(self, controller: Controller, version: str) -> SpeculationReport:
        """Return the counts with what the controller thinks."""
        return SpeculationReport(
            drafters=tuple(self._reports()),
            decisions=dict(controller.decisions),
            predicted_rate=controller.last.rate,
            off_rate=controller.last.off_rate,
            draft_version=version,
        )

    def _reports(self) -> Iterable[DrafterReport]:
        for name, counts in self._counts.items():
            drafter = self._arms[name]
            yield DrafterReport(
                name=name,
                version=drafter.version,
                rounds=counts.rounds,
                drafted=counts.drafted,
                accepted=counts.accepted,
                emitted=counts.accepted + counts.rounds,
                draft_s=counts.draft_s,
                tried_by_depth=tuple(counts.tried),
                accepted_by_depth=tuple(counts.kept),
                state_bytes=drafter.state_bytes,
                state_nodes=drafter.state_entries,
            )
