"""Metrics of the autoscaler: what it saw, what it decided, and why."""

from __future__ import annotations

from paceline.process.metrics.declaration import Area, counter, gauge
from paceline.process.metrics.labelled import Label

_POOL = Label("pool", "role of the workers", ("prefill", "decode"))


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
        "",
        Label("name", "as in the decision's line", max_values=64),
    )
    autoscaler_holding = gauge("1 while sizes are held because something is not known.", "")
    autoscaler_source_age_seconds = gauge(
        "Age of the newest sample that decisions rest on.", "seconds"
    )
    autoscaler_last_change_info = gauge(
        "Constant 1; labels tell the last decision that changed something, or began or ended to "
        "hold.",
        "",
        Label("kind", "grow, shrink, hold, wake, sleep, limited or steady", max_values=1),
        Label("reason", "the decision's line", max_values=1),
    )
    autoscaler_decisions = counter(
        "Decisions about sizes of pools.",
        "decisions",
        Label("kind", "as above; steady changes nothing", max_values=8),
    )
    autoscaler_source_failures = counter(
        "Decisions for which something was not known.",
        "decisions",
        Label("reason", "what was missing, see docs/scaling.md", max_values=32),
    )
    autoscaler_target_failures = counter(
        "Failed calls to whoever starts workers.",
        "calls",
        Label("reason", "what it answered, see docs/scaling.md", max_values=32),
    )
