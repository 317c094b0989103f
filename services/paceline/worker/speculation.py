"""The engine's reports of speculation: across the socket, and into metrics.

engine_process.py encodes reports, bridge.py decodes them and counts what is new. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.engine.spec.report import DECISION_REASONS, DrafterReport, SpeculationReport
from paceline.process.metrics import Metrics, RecentVersions
from paceline.process.metrics.speculation import MAX_POSITIONS
from paceline.v1 import engine_pb2


def report_to_proto(report: SpeculationReport) -> engine_pb2.SpeculationReport:
    """Encode a report."""
    return engine_pb2.SpeculationReport(
        drafters=[_drafter_to_proto(drafter) for drafter in report.drafters],
        decisions=[
            engine_pb2.SpeculationDecision(drafter=drafter, reason=reason, count=count)
            for (drafter, reason), count in report.decisions.items()
        ],
        predicted_rate=report.predicted_rate,
        off_rate=report.off_rate,
        draft_version=report.draft_version,
    )


def report_from_proto(message: engine_pb2.SpeculationReport) -> SpeculationReport:
    """Decode a report."""
    return SpeculationReport(
        drafters=tuple(_drafter_from_proto(drafter) for drafter in message.drafters),
        decisions={(each.drafter, each.reason): each.count for each in message.decisions},
        predicted_rate=message.predicted_rate,
        off_rate=message.off_rate,
        draft_version=message.draft_version,
    )


class SpeculationMetrics:
    """Counts what each report has more than the one before."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.last = SpeculationReport()
        """The latest report."""
        self.num_drafted = self.num_accepted = 0
        """Tokens proposed and accepted since the engine's start, by whomever."""
        self._recent = RecentVersions(
            (
                metrics.speculation_rounds,
                metrics.speculation_drafted_tokens,
                metrics.speculation_accepted_tokens,
                metrics.speculation_emitted_tokens,
                metrics.speculation_draft_seconds,
            )
        )

    def note(self, report: SpeculationReport) -> None:
        """Take the next report; what it has more than the last one counts."""
        last = {(drafter.name, drafter.version): drafter for drafter in self.last.drafters}
        for drafter in report.drafters:
            before = last.get((drafter.name, drafter.version)) or DrafterReport(drafter.name)
            self._recent.note(drafter.name, drafter.version)
            self._note_drafter(drafter, before)
            self.num_drafted += max(0, drafter.drafted - before.drafted)
            self.num_accepted += max(0, drafter.accepted - before.accepted)
        for (name, reason), count in report.decisions.items():
            more = count - self.last.decisions.get((name, reason), 0)
            self._metrics.speculation_decisions.labels(name, reason).inc(max(0, more))
        self._metrics.speculation_predicted_tokens_per_second.set(report.predicted_rate)
        self._metrics.speculation_off_tokens_per_second.set(report.off_rate)
        self.last = report

    def _note_drafter(self, now: DrafterReport, last: DrafterReport) -> None:
        metrics, labels = self._metrics, (now.name, now.version)
        for counter, more in (
            (metrics.speculation_rounds, now.rounds - last.rounds),
            (metrics.speculation_drafted_tokens, now.drafted - last.drafted),
            (metrics.speculation_accepted_tokens, now.accepted - last.accepted),
            (metrics.speculation_emitted_tokens, now.emitted - last.emitted),
            (metrics.speculation_draft_seconds, now.draft_s - last.draft_s),
        ):
            counter.labels(*labels).inc(max(0, more))
        for counter, counts, before in (
            (metrics.speculation_position_tried, now.tried_by_depth, last.tried_by_depth),
            (metrics.speculation_position_accepted, now.accepted_by_depth, last.accepted_by_depth),
        ):
            for depth, count in enumerate(counts[:MAX_POSITIONS]):
                more = count - _at(before, depth)
                counter.labels(now.name, depth + 1).inc(max(0, more))
        for reason in DECISION_REASONS:
            metrics.speculation_decisions.labels(now.name, reason)
        metrics.speculation_state_bytes.labels(now.name).set(now.state_bytes)
        metrics.speculation_state_nodes.labels(now.name).set(now.state_nodes)


def _at(counts: Sequence[int], index: int) -> int:
    return counts[index] if index < len(counts) else 0


def _drafter_to_proto(drafter: DrafterReport) -> engine_pb2.DrafterReport:
    return engine_pb2.DrafterReport(
        name=drafter.name,
        version=drafter.version,
        rounds=drafter.rounds,
        drafted=drafter.drafted,
        accepted=drafter.accepted,
        emitted=drafter.emitted,
        draft_s=drafter.draft_s,
        tried_by_depth=drafter.tried_by_depth,
        accepted_by_depth=drafter.accepted_by_depth,
        state_bytes=drafter.state_bytes,
        state_nodes=drafter.state_nodes,
    )


def _drafter_from_proto(message: engine_pb2.DrafterReport) -> DrafterReport:
    return DrafterReport(
        name=message.name,
        version=message.version,
        rounds=message.rounds,
        drafted=message.drafted,
        accepted=message.accepted,
        emitted=message.emitted,
        draft_s=message.draft_s,
        tried_by_depth=tuple(message.tried_by_depth),
        accepted_by_depth=tuple(message.accepted_by_depth),
        state_bytes=message.state_bytes,
        state_nodes=message.state_nodes,
    )
