"""Shows decisions: the autoscaler's metrics, and one log line per change of state."""

from __future__ import annotations

import logging
import re

from paceline.autoscaler.journal import num_draining
from paceline.autoscaler.problems import SOURCE_REASONS, TARGET_REASONS, reason_of
from paceline.autoscaler.values import KINDS, POOLS, Decision, Observation
from paceline.process.metrics import Metrics

logger = logging.getLogger(__name__)

_MAX_INPUTS = 64
_INPUT_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MAX_REASON = 240


class Report:
    """Keeps metrics and log true to the last decision."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._inputs: set[str] = set()
        self._was_holding = False
        self._sampled_s: float | None = None
        self._age_s: float | None = None
        for kind in KINDS:
            metrics.autoscaler_decisions.labels(kind)
        for reason in SOURCE_REASONS:
            metrics.autoscaler_source_failures.labels(reason)
        for reason in TARGET_REASONS:
            metrics.autoscaler_target_failures.labels(reason)
        self._last_change = ("steady", "started")
        metrics.autoscaler_last_change_info.labels(*self._last_change).set(1)

    def note_age(self, age_s: float | None) -> None:
        """Take the age of the newest sample of the observation that is being made."""
        self._age_s = age_s

    def note_target_failure(self, reason: str) -> None:
        """Count a failed call to the target."""
        self._metrics.autoscaler_target_failures.labels(reason).inc()

    def show(self, observation: Observation, decision: Decision) -> None:
        """Show a decision."""
        metrics = self._metrics
        metrics.autoscaler_decisions.labels(decision.kind).inc()
        for role in POOLS:
            pool = observation.pools[role]
            for gauge, count in (
                (metrics.autoscaler_desired_replicas, decision.replicas[role]),
                (metrics.autoscaler_requested_replicas, pool.requested),
                (metrics.autoscaler_ready_replicas, pool.ready),
                (metrics.autoscaler_starting_replicas, pool.starting),
                (metrics.autoscaler_draining_replicas, num_draining(observation, role)),
            ):
                gauge.labels(role.value).set(count)
        for name, value in decision.inputs.items():
            if self._is_input(name):
                metrics.autoscaler_input.labels(name).set(value)
        for reason in {reason_of(line, SOURCE_REASONS) for line in observation.problems}:
            if reason is not None:
                metrics.autoscaler_source_failures.labels(reason).inc()
        self._show_age(observation.at_s)
        self._show_change(observation, decision)

    def _is_input(self, name: str) -> bool:
        """Keep the label's values few, whatever a policy names."""
        if len(self._inputs) < _MAX_INPUTS and _INPUT_NAME.fullmatch(name):
            self._inputs.add(name)
        return name in self._inputs

    def _show_age(self, now_s: float) -> None:
        """Let the age grow on from the last one known while none can be found out."""
        if self._age_s is not None:
            self._sampled_s = now_s - self._age_s
        if self._sampled_s is not None:
            self._metrics.autoscaler_source_age_seconds.set(now_s - self._sampled_s)

    def _show_change(self, observation: Observation, decision: Decision) -> None:
        is_holding = decision.kind == "hold"
        has_changed = any(
            decision.replicas[role] != observation.pools[role].requested for role in POOLS
        )
        self._metrics.autoscaler_holding.set(is_holding)
        if has_changed or is_holding != self._was_holding:
            info = self._metrics.autoscaler_last_change_info
            info.remove(*self._last_change)
            self._last_change = (decision.kind, decision.reason[:_MAX_REASON])
            info.labels(*self._last_change).set(1)
            self._log(observation, decision)
        self._was_holding = is_holding

    def _log(self, observation: Observation, decision: Decision) -> None:
        sizes = {
            role.value: [observation.pools[role].requested, decision.replicas[role]]
            for role in POOLS
        }
        fields = {"kind": decision.kind, "reason": decision.reason, **sizes}
        if observation.problems:
            fields["problems"] = list(observation.problems)
        is_holding = decision.kind == "hold"
        level = logging.WARNING if is_holding else logging.INFO
        event = "holding" if is_holding else "decision"
        logger.log(level, event, extra={"fields": fields})
