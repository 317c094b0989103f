"""What could not be found out, as one line each: a stable reason, then what happened.

Sources and targets write these lines, an `Observation` carries them, logs and metrics count them
by reason.
"""

from __future__ import annotations

SOURCE_REASONS = (
    "prometheus-unreachable",
    "prometheus-timeout",
    "prometheus-http",
    "prometheus-redirect",
    "prometheus-too-large",
    "prometheus-garbage",
    "prometheus-refused",
    "prometheus-partial",
    "prometheus-missing",
    "prometheus-not-finite",
    "prometheus-negative",
    "prometheus-stale",
    "redis-unavailable",
    "fleet-incomplete",
    "fleet-untold",
    "source-failed",
    "replay-ended",
)
"""refused: Prometheus answered that it cannot compute it; partial: it computed it from less than
the whole fleet; incomplete: the membership lacks members that are there; untold: workers do not
say what they can do."""

TARGET_REASONS = (
    "target-unreachable",
    "target-timeout",
    "target-unauthenticated",
    "target-forbidden",
    "target-not-found",
    "target-conflict",
    "target-gone",
    "target-throttled",
    "target-refused",
    "target-error",
    "target-garbage",
    "target-owned",
    "target-changed",
    "target-failed",
)
"""owned: another scaler is responsible for the pool; changed: somebody else set its size; refused:
the request itself is not accepted; failed: an error that the target did not declare."""

_MAX_TEXT = 300


def problem(reason: str, text: str) -> str:
    """Return the line."""
    flat = " ".join(text.split())
    return f"{reason}: {flat[:_MAX_TEXT]}"


def reason_of(line: str, known: tuple[str, ...]) -> str | None:
    """Return the reason of a line, None if it is none of the known."""
    reason = line.partition(":")[0]
    return reason if reason in known else None
