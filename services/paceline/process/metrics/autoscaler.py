"""Metrics of the autoscaler: what it saw, what it decided, and why."""

from __future__ import annotations

from paceline.process.metrics.declaration import Area, counter, gauge
from paceline.process.metrics.labelled import Label

_POOL = Label("pool", "role of the workers", ("prefill", "decode"))
_KINDS = ("steady", "grow", "shrink", "hold", "wake", "sleep", "limited")
_KIND = Label(
    "kind",
    "`hold`: something is not known; `wake`, `sleep`: from and to zero; `limited`: a bound or the "
    "budget allows less than is needed",
    _KINDS,
)
MAX_INPUTS = 64


class AutoscalerArea(Area):
    """Decisions of scaling and what they are made of."""

    title = "Autoscaler"
    exported_by = frozenset({"autoscaler"})

    autoscaler_desired_replicas = gauge("Workers decided on.", "workers", _POOL)
    autoscaler_requested_replicas = gauge(
        "Workers that the target was last asked for, by whomever.", "workers", _POOL
    )
    autoscaler_ready_replicas = gauge("Workers that take requests.", "workers", _POOL)
    autoscaler_starting_replicas = gauge("Workers asked for and not ready yet.", "workers", _POOL)
    autoscaler_draining_replicas = gauge(
        "Workers that finish what they have and end.", "workers", _POOL
    )
    autoscaler_input = gauge(
        "Number that went into the last decision.",
        "as its name says",
        Label("name", "the number, with its unit", max_values=MAX_INPUTS),
    )
    autoscaler_holding = gauge("1 while sizes are held because something is not known.", "0 or 1")
    autoscaler_source_age_seconds = gauge(
        "Age of the newest sample that decisions rest on.", "seconds"
    )
    autoscaler_last_change_info = gauge(
        "Constant 1; the labels tell the last decision that changed something, or began or ended "
        "to hold. One series at a time.",
        "",
        _KIND,
        Label("reason", "its line, with the numbers that decided", max_values=1),
    )
    autoscaler_decisions = counter("Decisions about the sizes of pools.", "decisions", _KIND)
    autoscaler_source_failures = counter(
        "Decisions for which data was missing, by why.",
        "decisions",
        Label("reason", "reason of the missing data", max_values=32),
    )
    autoscaler_target_failures = counter(
        "Failed calls to whoever starts workers.",
        "calls",
        Label("reason", "reason of the error", max_values=32),
    )
