"""Is it healthy, is it fast, what changed: the dashboard to open first."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.dashboards.board import Row, Variable, board
from deploy.grafana.dashboards.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Panel,
    curves,
    number,
    quantiles,
    rates,
    rows,
    spread,
    up_states,
)
from deploy.grafana.dashboards.queries import CHOSEN, FLEET, Query, ratio

_BOUNDS = ("0.05", "0.1", "0.15", "0.2", "0.25", "0.3", "0.4", "0.5", "0.75", "1.0", "1.5", "2.0")
"""Edges of buckets that targets are usually set to."""

_VARIABLES = (
    Variable(
        "ttft_target",
        "TTFT within",
        "Seconds to first token to measure against; what counts as goodput is the gateway's own.",
        (*_BOUNDS, "3.0", "5.0", "10.0"),
        "1.0",
    ),
    Variable(
        "itl_target",
        "ITL within",
        "Seconds between pieces to measure against; what counts as goodput is the gateway's own.",
        ("0.01", "0.02", "0.03", *_BOUNDS),
        "0.1",
    ),
)
_RESULTS = {"good": GREEN, "slow-ttft": ORANGE, "slow-itl": "yellow", "failed": RED}
_ALLOWED_RATIO = 0.01
"""Requests that may not be good: what the objective of 99 % leaves."""
_RESTARTED_S = 600
"""Younger processes than this are a recent change."""


def overview() -> Dashboard:
    """Return the dashboard."""
    return board(
        "paceline-overview",
        "Paceline / Overview and SLO",
        "Health, latency against targets, load, and what changed.",
        [
            Row("Is it healthy, is it fast, what changed", _now()),
            Row("What clients get", _latency()),
            Row("Load", _load()),
            Row("Health", _health()),
            Row("Over days, by recording rules", _recorded()),
        ],
        variables=_VARIABLES,
    )


def _now() -> list[Panel]:
    alerts = 'count(ALERTS{alertname=~"Paceline.+", alertstate="firing"}) or vector(0)'
    good = ratio(
        FLEET.rate("paceline_slo_requests_total", 'result="good"'),
        FLEET.rate("paceline_slo_requests_total"),
    )
    failed = ratio(
        FLEET.rate("paceline_slo_requests_total", 'result="failed"'),
        FLEET.rate("paceline_slo_requests_total"),
    )
    return [
        number(
            "Alerts firing",
            "Paceline's alerts that fire now; each has a page in docs/operations.md.",
            "none",
            Query(alerts, "alerts"),
            steps=[(1, RED)],
        ),
        number(
            "Workers ready",
            "Workers that take requests, by pool, as the gateway that sees fewest knows them. "
            "Red: nobody is there, requests wait or are refused.",
            "none",
            Query(FLEET.min("paceline_ready_workers", by="pool"), "{{pool}}"),
            steps=[(1, GREEN)],
            base=RED,
            shows_name=True,
        ),
        number(
            "Goodput",
            "Share of requests that met both targets of the gateway, of those that count. "
            "Below 99 %: see which target is missed under Results.",
            "percentunit",
            Query(good, "good"),
            steps=[(0.95, ORANGE), (0.99, GREEN)],
            base=RED,
        ),
        number(
            "Failed",
            "Share of requests that ended with an error which is not the client's. "
            "Which error: RPC errors below.",
            "percentunit",
            Query(failed, "failed"),
            steps=[(0.001, ORANGE), (0.01, RED)],
        ),
        number(
            "TTFT in target",
            "Share of first tokens within the TTFT chosen above. Low with waiting sequences: more "
            "prefill workers are needed.",
            "percentunit",
            Query(FLEET.within("paceline_ttft_seconds", "$ttft_target"), "within"),
            steps=[(0.95, ORANGE), (0.99, GREEN)],
            base=RED,
        ),
        number(
            "ITL in target",
            "Share of gaps between pieces within the ITL chosen above. Low: decode workers run too "
            "many sequences, or prompts are computed beside them.",
            "percentunit",
            Query(FLEET.within("paceline_itl_seconds", "$itl_target"), "within"),
            steps=[(0.95, ORANGE), (0.99, GREEN)],
            base=RED,
        ),
        number(
            "Versions running",
            "Different versions of Paceline among the processes; more than one during a rollout "
            "only.",
            "none",
            Query(f"count({FLEET.sum('paceline_build_info', by='version')})", "versions"),
            steps=[(2, ORANGE)],
        ),
        number(
            "Last start",
            "How long ago the youngest process started. Orange: one came or restarted within ten "
            "minutes; the marks in the curves tell which.",
            "s",
            Query(f"time() - {FLEET.max('process_start_time_seconds')}", "ago"),
            steps=[(_RESTARTED_S, GREEN)],
            base=ORANGE,
            decimals=0,
        ),
    ]


def _latency() -> list[Panel]:
    def target(name: str) -> Query:
        return Query(FLEET.max("paceline_slo_target_seconds", f'target="{name}"'), "target")

    def missed(histogram: str, bound: str) -> str:
        return f"1 - {FLEET.within(histogram, bound)}"

    return [
        quantiles(
            "Time to first token",
            "From arrival at the gateway to the first token, queueing included; dashed, the "
            "gateway's target.",
            "paceline_ttft_seconds",
            target("ttft"),
            scope=FLEET,
            target="target",
        ),
        quantiles(
            "Gap between pieces (ITL)",
            "Between pieces of one output; a piece has several tokens where a draft was accepted. "
            "Dashed, the gateway's target.",
            "paceline_itl_seconds",
            target("itl"),
            scope=FLEET,
            target="target",
        ),
        quantiles(
            "End to end",
            "From arrival to the last token; grows with the length of answers.",
            "paceline_e2e_seconds",
            scope=FLEET,
        ),
        curves(
            "Results",
            "Requests that count for the SLO, by what became of them. slow-ttft: queue or prefill; "
            "slow-itl: decode; failed: errors.",
            "reqps",
            Query(FLEET.rate("paceline_slo_requests_total", by="result"), "{{result}}"),
            colors=_RESULTS,
            is_stacked=True,
        ),
        curves(
            "Out of target",
            "Share of first tokens and of gaps that took longer than the bounds chosen above.",
            "percentunit",
            Query(missed("paceline_ttft_seconds", "$ttft_target"), "TTFT"),
            Query(missed("paceline_itl_seconds", "$itl_target"), "ITL"),
            steps=[(0.01, ORANGE), (0.05, RED)],
            max_value=1,
        ),
        spread(
            "TTFT, all of it",
            "How first tokens are distributed; two bands are two kinds of requests, such as with "
            "and without a cached prefix.",
            "paceline_ttft_seconds",
            scope=FLEET,
            width=8,
        ),
    ]


def _load() -> list[Panel]:
    return [
        rates(
            "Requests",
            "Arrivals and admissions per second; the difference was refused or is parked.",
            "reqps",
            {
                "received": "paceline_requests_received_total",
                "ended": "paceline_requests_finished_total",
            },
            scope=FLEET,
        ),
        curves(
            "Requests at work",
            "Admitted requests, sequences that run and wait in the engines, and requests that the "
            "gateway holds because no worker is there.",
            "none",
            Query(FLEET.sum("paceline_requests_running"), "admitted"),
            Query(FLEET.sum("paceline_engine_running"), "running"),
            Query(FLEET.sum("paceline_engine_waiting"), "waiting"),
            Query(FLEET.sum("paceline_requests_parked"), "parked"),
            colors={"waiting": ORANGE, "parked": RED},
        ),
        quantiles(
            "Time in queue, p95 by role",
            "From arrival at a worker to its first step there. Grows before TTFT does.",
            "paceline_queue_seconds",
            scope=CHOSEN,
            by="role",
        ),
        rates(
            "Tokens",
            "Prompt tokens taken in, those of them found in a cache, and tokens sent.",
            "suffix: tok/s",
            {
                "prompt": "paceline_prompt_tokens_total",
                "cached": "paceline_cached_prompt_tokens_total",
                "sent": "paceline_completion_tokens_total",
            },
            scope=FLEET,
            colors={"cached": GREEN, "prompt": BLUE, "sent": ORANGE},
        ),
        curves(
            "Length of requests",
            "Tokens of prompts and of answers, median and p95: the shape of the traffic that sizes "
            "are made for.",
            "suffix: tok",
            Query(FLEET.quantile(0.5, "paceline_request_prompt_tokens"), "prompt p50"),
            Query(FLEET.quantile(0.95, "paceline_request_prompt_tokens"), "prompt p95"),
            Query(FLEET.quantile(0.5, "paceline_request_output_tokens"), "answer p50"),
            Query(FLEET.quantile(0.95, "paceline_request_output_tokens"), "answer p95"),
        ),
        curves(
            "Ends of requests",
            "stop: the model ended; length: max_tokens; cancelled by the client; error: with a "
            "reason, see RPC errors.",
            "reqps",
            Query(
                FLEET.rate("paceline_requests_finished_total", by="finish_reason"),
                "{{finish_reason}}",
            ),
            colors={"stop": GREEN, "length": BLUE, "cancelled": GREY, "error": RED},
            is_stacked=True,
        ),
    ]


def _health() -> list[Panel]:
    age = f"time() - {CHOSEN.max('process_start_time_seconds', by='member')}"
    return [
        curves(
            "Workers ready",
            "Workers that take requests, by pool.",
            "none",
            Query(FLEET.min("paceline_ready_workers", by="pool"), "{{pool}}"),
            is_stepped=True,
        ),
        curves(
            "RPC errors",
            "Calls that ended with another code than OK or CANCELLED, over all servers, by code "
            "and reason; docs/api.md tells what each means.",
            "reqps",
            Query(
                CHOSEN.rate(
                    "paceline_rpc_requests_total", 'code!~"OK|CANCELLED"', by="code, reason"
                ),
                "{{code}} {{reason}}",
            ),
            is_stacked=True,
        ),
        up_states(
            "Links",
            "Redis, a worker's KV node, a worker's trainer. Without Redis serving goes on with "
            "the last view; without a KV node prompts are computed in full.",
            {
                "Redis": "paceline_redis_up",
                "KV node": "paceline_kv_link_up",
                "trainer": "paceline_trainer_link_up",
            },
            width=8,
        ),
        rows(
            "Processes",
            "Who is there, which version it runs, and for how long.",
            "none",
            Query(CHOSEN.max("paceline_build_info", by="member, role, model_name, version")),
            Query(age),
            Query(CHOSEN.max("process_resident_memory_bytes", by="member")),
            columns={
                "member": "member",
                "role": "role",
                "model_name": "model",
                "version": "version",
                "Value #B": "up for",
                "Value #C": "memory",
            },
            units={"up for": "s", "memory": "bytes"},
            width=24,
        ),
    ]


def _recorded() -> list[Panel]:
    def quantile(histogram: str, name: str) -> Query:
        return Query(FLEET.series(f"paceline:{histogram}:{name}_5m"), f"{{{{model}}}} {name}")

    def burn(window: str) -> Query:
        missed = f"1 - {FLEET.series(f'paceline:goodput:ratio_rate{window}')}"
        return Query(f"({missed}) / {_ALLOWED_RATIO}", f"{{{{model}}}} {window}")

    return [
        curves(
            "Burn of the error budget",
            "Requests that were not good over the 1 % that may be, in windows of several lengths. "
            "At 1 the budget lasts exactly; alerts fire at 14 for an hour and 6 for six hours.",
            "none",
            *(burn(window) for window in ("5m", "1h", "6h")),
            steps=[(1, ORANGE), (14, RED)],
        ),
        curves(
            "Time to first token",
            "Quantiles of five minutes; quick to show over weeks.",
            "s",
            *(quantile("ttft_seconds", name) for name in ("p50", "p95", "p99")),
        ),
        curves(
            "Gap between pieces (ITL)",
            "Quantiles of five minutes; quick to show over weeks.",
            "s",
            *(quantile("itl_seconds", name) for name in ("p50", "p95", "p99")),
        ),
        curves(
            "End to end, p95",
            "From arrival to the last token, quantile of five minutes.",
            "s",
            quantile("e2e_seconds", "p95"),
        ),
        curves(
            "Requests",
            "Arrivals per second over five minutes: the shape of days and weeks.",
            "reqps",
            Query(FLEET.series("paceline:requests_received:rate5m"), "{{model}}"),
        ),
        curves(
            "Tokens",
            "Taken in and sent per second over five minutes.",
            "suffix: tok/s",
            Query(FLEET.series("paceline:prompt_tokens:rate5m"), "{{model}} prompt"),
            Query(FLEET.series("paceline:output_tokens:rate5m"), "{{model}} sent"),
        ),
    ]
