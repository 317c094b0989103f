"""The processes themselves: event loops, garbage, memory, CPU, files, calls, Redis, steps."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.dashboards.board import Row, board
from deploy.grafana.dashboards.panels import (
    GREEN,
    ORANGE,
    RED,
    Panel,
    curves,
    number,
    quantiles,
    up_states,
)
from deploy.grafana.dashboards.queries import CHOSEN, Query, ratio

_LATE = [(0.05, ORANGE), (0.2, RED)]
"""Seconds: a loop that is late by this much delays every stream of its process."""
_BAD = 'code!~"OK|CANCELLED"'


def runtime() -> Dashboard:
    """Return the dashboard."""
    return board(
        "paceline-runtime",
        "Paceline / Runtime",
        "Event loops, garbage collection, memory, CPU, files, gRPC, Redis and engine steps.",
        [
            Row("Are processes up, prompt and within bounds", _now()),
            Row("Event loop and garbage collection", _loop()),
            Row("Processes", _processes()),
            Row("gRPC", _rpc()),
            Row("Redis", _redis()),
            Row("Engine", _engine()),
        ],
    )


def _files(by: str) -> str:
    return ratio(CHOSEN.max("process_open_fds", by=by), CHOSEN.max("process_max_fds", by=by))


def _now() -> list[Panel]:
    down = f"sum({CHOSEN.series('up')} == bool 0)"
    started = CHOSEN.max("process_start_time_seconds", by="member")
    return [
        number(
            "Scraped",
            "Processes that answer Prometheus.",
            "none",
            Query(f"sum({CHOSEN.series('up')})", "up"),
            steps=[(1, GREEN)],
            base=RED,
        ),
        number(
            "Not answering",
            "Processes that are known and do not answer Prometheus: starting, hung or gone.",
            "none",
            Query(down, "down"),
            steps=[(1, RED)],
        ),
        number(
            "Loop delay p99",
            "How late the latest event loop is; everything in that process waits this long.",
            "s",
            Query(
                f"max({CHOSEN.quantile(0.99, 'paceline_event_loop_delay_seconds', by='member')})",
                "worst",
            ),
            steps=_LATE,
        ),
        number(
            "RPC errors",
            "Calls per second that ended with another code than OK or CANCELLED.",
            "reqps",
            Query(CHOSEN.rate("paceline_rpc_requests_total", _BAD), "errors"),
            steps=[(0.1, ORANGE), (1, RED)],
        ),
        number(
            "Redis p99",
            "Of calls to Redis, failed ones included. Tokens never wait for it; membership and "
            "the index do.",
            "s",
            Query(CHOSEN.quantile(0.99, "paceline_redis_seconds"), "p99"),
            steps=[(0.1, ORANGE), (0.5, RED)],
        ),
        number(
            "CPU",
            "Cores that all processes use.",
            "suffix: cores",
            Query(CHOSEN.rate("process_cpu_seconds_total"), "cores"),
            decimals=1,
        ),
        number(
            "Memory",
            "Resident memory of all processes; pages that they share count more than once.",
            "bytes",
            Query(CHOSEN.sum("process_resident_memory_bytes"), "memory"),
        ),
        number(
            "Restarts",
            "Processes that started again under their name within the time shown.",
            "none",
            # By name, not by series: a process that starts again may have another address.
            Query(f"sum(changes({started}[$__range:30s]))", "restarts"),
            steps=[(1, ORANGE), (5, RED)],
        ),
    ]


def _loop() -> list[Panel]:
    return [
        quantiles(
            "Event loop delay, p95 by process",
            "How late the loop calls what is due. High in a gateway: too many streams for one "
            "process, or something blocks it.",
            "paceline_event_loop_delay_seconds",
            scope=CHOSEN,
            by="member",
        ),
        quantiles(
            "Event loop delay",
            "Over all chosen processes.",
            "paceline_event_loop_delay_seconds",
            scope=CHOSEN,
        ),
        curves(
            "Tasks",
            "Live tasks of the event loop. Growing while load does not is a leak.",
            "none",
            Query(CHOSEN.sum("paceline_tasks", by="member"), "{{member}}"),
        ),
        curves(
            "Time in garbage collection",
            "Share of the time, by process; everything in the process stands still meanwhile.",
            "percentunit",
            Query(CHOSEN.rate("paceline_gc_seconds_total", by="member"), "{{member}}"),
            steps=[(0.05, ORANGE)],
        ),
        curves(
            "Garbage collections",
            "Per second and generation; 2 is the whole heap.",
            "suffix: /s",
            Query(CHOSEN.rate("paceline_gc_collections_total", by="generation"), "{{generation}}"),
        ),
        curves(
            "Labels over their bound",
            "Observations per second that were counted as `other` because a label has its most "
            "values; the metric's panels are no longer complete.",
            "suffix: /s",
            Query(CHOSEN.rate("paceline_metrics_label_overflow_total", by="metric"), "{{metric}}"),
        ),
    ]


def _processes() -> list[Panel]:
    return [
        curves(
            "CPU",
            "Cores that each process uses, its engine's child process not included.",
            "suffix: cores",
            Query(CHOSEN.rate("process_cpu_seconds_total", by="member"), "{{member}}"),
        ),
        curves(
            "Memory",
            "Resident memory of each process, the arena's pages that it touched included.",
            "bytes",
            Query(CHOSEN.sum("process_resident_memory_bytes", by="member"), "{{member}}"),
        ),
        curves(
            "Open files",
            "Share of the files that a process may open; at 100 % it can accept no connections.",
            "percentunit",
            Query(_files("member"), "{{member}}"),
            steps=[(0.8, RED)],
        ),
        up_states(
            "Answering Prometheus",
            "Whether each known process could be scraped.",
            {"": "up"},
        ),
        curves(
            "Age",
            "Time since each process started; back to 0 is a restart.",
            "s",
            Query(
                f"time() - {CHOSEN.max('process_start_time_seconds', by='member')}", "{{member}}"
            ),
            width=12,
        ),
    ]


def _rpc() -> list[Panel]:
    return [
        curves(
            "Calls",
            "Finished calls per second, by method.",
            "reqps",
            Query(CHOSEN.rate("paceline_rpc_requests_total", by="method"), "{{method}}"),
        ),
        quantiles(
            "Duration, p95 by method",
            "From the first byte in to the last one out. Streams take as long as their answers, "
            "standing calls as long as the process lives.",
            "paceline_rpc_seconds",
            scope=CHOSEN,
            by="method",
        ),
        curves(
            "Errors",
            "Other codes than OK and CANCELLED, by method, code and reason; docs/api.md tells what "
            "each means.",
            "reqps",
            Query(
                CHOSEN.rate("paceline_rpc_requests_total", _BAD, by="method, code, reason"),
                "{{code}} {{reason}} {{method}}",
            ),
            is_stacked=True,
        ),
    ]


def _redis() -> list[Panel]:
    return [
        quantiles(
            "Duration of calls",
            "Over all chosen processes, failed calls included.",
            "paceline_redis_seconds",
            scope=CHOSEN,
        ),
        curves(
            "Calls",
            "Calls to Redis per second, by role.",
            "suffix: /s",
            Query(CHOSEN.rate("paceline_redis_seconds_count", by="role"), "{{role}}"),
        ),
        up_states(
            "Redis answers",
            "By process: one that is down alone has a network of its own to look at.",
            {"": "paceline_redis_up"},
            width=8,
        ),
    ]


def _engine() -> list[Panel]:
    steps = "paceline_engine_step_seconds"
    return [
        quantiles(
            "Duration of steps, p95 by worker",
            "One pass over all rows of a step; a lower bound of ITL.",
            steps,
            scope=CHOSEN,
            by="member",
        ),
        curves(
            "Steps",
            "Per second, by worker.",
            "suffix: /s",
            Query(CHOSEN.rate(f"{steps}_count", by="member"), "{{member}}"),
        ),
        curves(
            "Busy",
            "Share of the time that each engine spent in steps; near 100 % it has no room left.",
            "percentunit",
            Query(CHOSEN.rate(f"{steps}_sum", by="member"), "{{member}}"),
            steps=[(0.9, ORANGE)],
        ),
    ]
