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

MAX_VERSIONS = 4
"""Versions of an arm that are told apart, the latest ones."""


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
    """Counts since the start, or since an arm or a version last came."""

    def __init__(self, arms: Mapping[str, Drafter]) -> None:
        self._counts: dict[str, dict[str, _Counts]] = {}
        """By arm and version, the version that drafted last at the end."""
        self.change(arms)

    def change(self, arms: Mapping[str, Drafter]) -> None:
        """Count these arms from now on."""
        self._arms = arms
        self._counts = {arm: self._counts.get(arm, {}) for arm in arms}

    def add(
        self,
        outcomes: Sequence[Outcome],
        versions: Sequence[str],
        draft_s: Mapping[str, tuple[int, float]],
        observed_s: float,
    ) -> None:
        """Count a step.

        Args:
            outcomes: of its sequences.
            versions: that drafted for them, one each; empty where nobody has weights.
            draft_s: sequences and seconds of drafting, by arm.
            observed_s: went into learning from the step.
        """
        rows: dict[str, list[str]] = {}
        for outcome, version in zip(outcomes, versions, strict=True):
            arm = outcome.decision.arm
            if arm == OFF:
                continue
            rows.setdefault(arm, []).append(version)
            if outcome.tree.tokens:
                self._counts_of(arm, version).add(outcome)
        for arm, (_, seconds) in draft_s.items():
            seconds += observed_s / len(draft_s)
            drafting = rows.get(arm) or [self._arms[arm].version]
            for version in drafting:
                self._counts_of(arm, version).draft_s += seconds / len(drafting)

    def _counts_of(self, arm: str, version: str) -> _Counts:
        by_version = self._counts[arm]
        counts = by_version[version] = by_version.pop(version, _Counts())
        if len(by_version) > MAX_VERSIONS:
            del by_version[next(iter(by_version))]
        return counts

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
        for name, drafter in self._arms.items():
            self._counts_of(name, drafter.version)
            for version, counts in self._counts[name].items():
                yield _report(name, version, counts, drafter)


def _report(name: str, version: str, counts: _Counts, drafter: Drafter) -> DrafterReport:
    return DrafterReport(
        name=name,
        version=version,
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
