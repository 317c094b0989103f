"""Metrics of the gateway: what clients ask for and what they get."""

from __future__ import annotations

from paceline.process.metrics.declaration import Area, counter, gauge, seconds, tokens
from paceline.process.metrics.labelled import Label


class GatewayArea(Area):
    """Requests, seen from the public door."""

    title = "Gateway"
    exported_by = frozenset({"gateway"})

    requests_received = counter(
        "Requests of known callers, those that are refused or parked included.", "requests"
    )
    requests_parked = gauge("Requests that wait because no decode worker is there.", "requests")
    requests_running = gauge("Admitted requests that did not end.", "requests")
    requests_finished = counter(
        "Requests that ended, by how.",
        "requests",
        Label(
            "finish_reason",
            "`stop`, `length` (an output met max_tokens), `cancelled` by the client, `error`",
            ("stop", "length", "cancelled", "error"),
        ),
    )
    slo_requests = counter(
        "Ended requests that count for the SLO: neither cancelled nor wrong by the client.",
        "requests",
        Label(
            "result",
            "`good`, `slow-ttft` and `slow-itl` (mean gap per token) over target, `failed`",
            ("good", "slow-ttft", "slow-itl", "failed"),
        ),
    )
    slo_target_seconds = gauge(
        "What a good request takes at most.",
        "seconds",
        Label("target", "first token or mean gap between tokens", ("ttft", "itl")),
    )
    ttft_seconds = seconds("Arrival to first token, per output.")
    itl_seconds = seconds("Gap between pieces of one output.")
    e2e_seconds = seconds("Arrival to last token, per output.")
    prompt_tokens = counter("Prompt tokens admitted.", "tokens")
    cached_prompt_tokens = counter("Prompt tokens whose KV was found in a cache.", "tokens")
    completion_tokens = counter("Tokens sent to clients.", "tokens")
    request_prompt_tokens = tokens("Prompt tokens per request.")
    request_output_tokens = tokens("Tokens sent per request that began to answer.")
    routing_decisions = counter(
        "Routing decisions.",
        "decisions",
        Label(
            "kind",
            "prefill and decode apart, both on the decode worker, or a broken stream's new worker",
            ("split", "decode-only", "resumed"),
        ),
    )
    migrations = counter("Streams resumed on another worker.", "streams")
    ready_workers = gauge(
        "Workers that take requests, as this gateway sees them.",
        "workers",
        Label("pool", "their role", ("prefill", "decode")),
    )
