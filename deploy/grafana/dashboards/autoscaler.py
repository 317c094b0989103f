"""How many workers there are and should be, what was seen, and why it was decided so."""

from __future__ import annotations

from grafana_foundation_sdk.builders import timeseries
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.dashboards.board import Choice, Row, board
from deploy.grafana.dashboards.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Panel,
    curves,
    number,
    rows,
    states,
)
from deploy.grafana.dashboards.queries import FLEET, Query

_HOLDING = {"0": ("deciding", GREEN), "1": ("holding", RED)}
_KINDS = {
    "steady": GREY,
    "grow": GREEN,
    "shrink": BLUE,
    "wake": "purple",
    "sleep": "dark-blue",
    "limited": ORANGE,
    "hold": RED,
}
_COUNTS = ("desired", "requested", "ready", "starting", "draining")
_LONG_S, _TOO_LONG_S = 30, 120


def autoscaler() -> Dashboard:
    """Return the dashboard."""
    return board(
        "paceline-autoscaler",
        "Paceline / Autoscaler",
        "Sizes of the pools, everything that went into them, and the reasons.",
        [
            Row("Is it deciding, are sizes right, what changed", _now()),
            Row("Sizes", _sizes()),
            Row("Reasons", _reasons()),
            Row("What it sees", _inputs()),
        ],
        variables=[Choice("input", "Input", "name", FLEET.series("paceline_autoscaler_input"))],
    )


def _replicas(count: str, *matchers: str) -> str:
    return FLEET.max(f"paceline_autoscaler_{count}_replicas", *matchers, by="pool")


def _now() -> list[Panel]:
    failures = [
        FLEET.increase("paceline_autoscaler_source_failures_total"),
        FLEET.increase("paceline_autoscaler_target_failures_total"),
    ]
    return [
        number(
            "State",
            "Holding: data is missing or stale, sizes stay as they are. Why: Last decision.",
            "none",
            Query(FLEET.max("paceline_autoscaler_holding"), "state"),
            width=4,
            words=_HOLDING,
        ),
        number(
            "Desired",
            "Workers that each pool should have.",
            "none",
            Query(_replicas("desired"), "{{pool}}"),
            width=4,
            shows_name=True,
        ),
        number(
            "Missing",
            "Desired workers that are not ready yet. For longer than a start takes: see the logs "
            "of new workers, or the cluster's capacity.",
            "none",
            Query(f"clamp_min({_replicas('desired')} - {_replicas('ready')}, 0)", "{{pool}}"),
            steps=[(1, ORANGE)],
            width=4,
            shows_name=True,
        ),
        number(
            "Age of what it sees",
            "Seconds since the source last gave usable data; beyond its limit sizes are held.",
            "s",
            Query(FLEET.max("paceline_autoscaler_source_age_seconds"), "age"),
            width=4,
            steps=[(_LONG_S, ORANGE), (_TOO_LONG_S, RED)],
        ),
        number(
            "Failures",
            "Failed questions to the source and failed changes of sizes within the time shown.",
            "none",
            Query(" + ".join(failures), "failures"),
            width=4,
            steps=[(1, ORANGE)],
            decimals=0,
        ),
        number(
            "Parked",
            "Requests that the gateway holds until a worker is there; they wake a pool at zero.",
            "none",
            Query(FLEET.sum("paceline_requests_parked"), "parked"),
            width=4,
            steps=[(1, ORANGE)],
        ),
        rows(
            "Last decision",
            "The last change of sizes, or hold, and its reason with the numbers that decided; the "
            "same line as in the log and of `paceline autoscaler explain`.",
            "none",
            Query(FLEET.max("paceline_autoscaler_last_change_info", by="kind, reason")),
            columns={"kind": "decision", "reason": "reason"},
            width=24,
            height=4,
        ),
    ]


def _sizes() -> list[Panel]:
    return [
        curves(
            f"{pool.capitalize()} workers",
            "desired: what the policy wants; requested: what the cluster was asked for; ready: "
            "what takes requests; starting and draining: on their way.",
            "none",
            *(Query(_replicas(count, f'pool="{pool}"'), count) for count in _COUNTS),
            width=12,
            colors={
                "desired": BLUE,
                "requested": GREY,
                "ready": GREEN,
                "starting": ORANGE,
                "draining": "purple",
            },
            is_stepped=True,
        )
        for pool in ("prefill", "decode")
    ]


def _reasons() -> list[Panel]:
    info = FLEET.series("paceline_autoscaler_last_change_info")
    seen = f"max by (kind, reason) (max_over_time(timestamp({info})[$__range:15s])) * 1000"
    return [
        rows(
            "Decisions",
            "Every decision that was the last one at some time shown, and until when it was.",
            "none",
            Query(seen),
            columns={"Value": "until", "kind": "decision", "reason": "reason"},
            units={"until": "dateTimeAsIso"},
            width=24,
            sort_by="until",
        ),
        curves(
            "Kinds of decisions",
            "limited: a bound or the budget allows less than is needed; hold: data is missing.",
            "suffix: /s",
            Query(FLEET.rate("paceline_autoscaler_decisions_total", by="kind"), "{{kind}}"),
            colors=_KINDS,
            is_stacked=True,
        ),
        states(
            "Holding",
            "When sizes were held because data was missing or stale.",
            Query(FLEET.max("paceline_autoscaler_holding"), "autoscaler"),
            words=_HOLDING,
            width=8,
        ),
        curves(
            "Failures",
            "Questions to the source and changes of sizes that failed, per second and reason.",
            "suffix: /s",
            Query(
                FLEET.rate("paceline_autoscaler_source_failures_total", by="reason"),
                "source {{reason}}",
            ),
            Query(
                FLEET.rate("paceline_autoscaler_target_failures_total", by="reason"),
                "target {{reason}}",
            ),
        ),
    ]


def _inputs() -> list[Panel]:
    value = FLEET.max("paceline_autoscaler_input", by="name")
    return [
        curves(
            "Age of what it sees",
            "Seconds since the source last gave usable data.",
            "s",
            Query(FLEET.max("paceline_autoscaler_source_age_seconds"), "age"),
            steps=[(_TOO_LONG_S, RED)],
            width=12,
        ),
        rows(
            "Inputs now",
            "Every number that went into the last decision; its name tells the unit.",
            "short",
            Query(value),
            columns={"name": "input", "Value": "value"},
            width=12,
        ),
        _each_input(),
    ]


def _each_input() -> timeseries.Panel:
    """Return a panel that Grafana repeats for every input, since each has its own scale."""
    value = FLEET.max("paceline_autoscaler_input", 'name=~"$input"', by="name")
    return (
        curves(
            "$input",
            "One of the numbers that go into decisions; its name tells the unit.",
            "short",
            Query(value, "{{name}}"),
            width=8,
        )
        .repeat("input")
        .repeat_direction("h")
    )
