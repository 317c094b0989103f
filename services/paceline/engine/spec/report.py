"""What speculation brought, in plain values: the engine's report to its host.

Counts run since the engine's start; worker/speculation.py turns their differences into metrics.
Making a report takes time that steps do not have, so that the engine makes a few per second
(`PacedReport`) and its host sends each one once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

REPORT_PERIOD_S = 0.5
"""Shortest time between two reports."""

DECISION_REASONS = ("on", "off", "explore", "forced")
"""It pays; it would not; tried to learn whether it pays; the request named the drafter."""


@dataclass(frozen=True, slots=True)
class DrafterReport:
    """What the drafts of one drafter brought."""

    name: str
    version: str = ""
    """Version of its weights; empty where it has none. There is a report for each version that
    drafted lately, and one for the active one."""
    rounds: int = 0
    """Drafts verified: one per sequence and step."""
    drafted: int = 0
    """Tokens proposed."""
    accepted: int = 0
    """Proposed tokens accepted."""
    emitted: int = 0
    """Tokens emitted by the passes that verified its drafts: accepted ones, and one per round."""
    draft_s: float = 0.0
    """Seconds spent in `propose` and `observe`."""
    tried_by_depth: tuple[int, ...] = ()
    """[d] drafts with nodes at depth d + 1 whose parent was accepted."""
    accepted_by_depth: tuple[int, ...] = ()
    """[d] those of which a node at depth d + 1 was accepted."""
    state_bytes: int = 0
    """Memory of what it keeps for all sequences together."""
    state_nodes: int = 0
    """Nodes or entries in it."""


@dataclass(frozen=True, slots=True)
class SpeculationReport:
    """What speculation brought, by drafter."""

    drafters: tuple[DrafterReport, ...] = ()
    """All that take part, also those without a draft so far."""
    decisions: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """How often the controller decided, by drafter and reason (`DECISION_REASONS`)."""
    predicted_rate: float = 0.0
    """Tokens per second that the controller expects of its last choice."""
    off_rate: float = 0.0
    """Tokens per second that it expects of the same step without a draft."""
    draft_version: str = ""
    """Version of the draft model now; empty without one."""


class PacedReport:
    """Makes a report anew when the last one is old enough; until then it is the same object."""

    def __init__(self, make: Callable[[], SpeculationReport]) -> None:
        self._make = make
        self._report: SpeculationReport | None = None
        self._made_s = 0.0

    def expire(self) -> None:
        """Make the next one anew whatever the time."""
        self._report = None

    def at(self, now_s: float) -> SpeculationReport:
        """Return the report of this (monotonic) time."""
        if self._report is None or now_s - self._made_s >= REPORT_PERIOD_S:
            self._report, self._made_s = self._make(), now_s
        return self._report
