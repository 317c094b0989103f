"""Declares every metric of the platform, with unit and meaning, and serves them.

One `Metrics` per process, made in its main and passed down. Counters with known label values
start at 0, so that rates exist before the first event.
"""

from __future__ import annotations

import asyncio

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)

from paceline import __version__

LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4,
    0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
"""From half a millisecond (small models) up; common SLO thresholds are exact edges."""


class Metrics:
    """All metrics on one registry; a process touches those of its part."""

    def __init__(self, service: str, model: str = "") -> None:
        self.registry = CollectorRegistry()
        # Memory, CPU time and open files of the process, under their usual names.
        ProcessCollector(registry=self.registry)
        info = self._gauge(
            "build_info", "Constant 1; labels tell the process", "service", "model", "version"
        )
        info.labels(service, model, __version__).set(1)
        self.tasks = self._gauge("tasks", "Live tasks of the event loop")
        self.redis_up = self._gauge("redis_up", "1 while Redis answers this process")
        self.rpc_requests = self._counter(
            "rpc_requests", "Finished gRPC calls", "method", "code", "reason"
        )
        self.rpc_seconds = self._histogram("rpc_seconds", "Duration of gRPC calls", "method")
        self.trace_spans_dropped = self._counter(
            "trace_spans_dropped", "Spans that did not reach the collector"
        )
        self._declare_gateway()
        self._declare_worker()
        self._declare_speculation()
        self._declare_capture()
        self._declare_kv_node()
        self._declare_draft_link()
        self._declare_training()

    def watch_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Report the tasks of a loop; counted when scraped, on the scraping thread."""
        self.tasks.set_function(lambda: len(asyncio.all_tasks(loop)))

    def _declare_gateway(self) -> None:
        self.requests_running = self._gauge("requests_running", "Admitted requests")
        self.ttft_seconds = self._histogram("ttft_seconds", "Arrival to first token")
        self.itl_seconds = self._histogram("itl_seconds", "Gap between pieces of one output")
        self.e2e_seconds = self._histogram("e2e_seconds", "Arrival to last token")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens admitted")
        self.cached_tokens = self._counter(
            "cached_prompt_tokens", "Prompt tokens whose KV was found in a cache"
        )
        self.completion_tokens = self._counter("completion_tokens", "Tokens sent to clients")
        self.routing_decisions = self._counter("routing_decisions", "Routing decisions", "kind")
        self.migrations = self._counter("migrations", "Streams resumed on another worker")

    def _declare_worker(self) -> None:
        self.kv_saved_blocks = self._counter("kv_saved_blocks", "Blocks written to the KV store")
        self.kv_saved_bytes = self._counter("kv_saved_bytes", "Bytes written to the KV store")
        self.kv_loaded_blocks = self._counter("kv_loaded_blocks", "Blocks read from the KV store")
        self.kv_loaded_bytes = self._counter("kv_loaded_bytes", "Bytes read from the KV store")
        self.kv_corrupt_blocks = self._counter(
            "kv_corrupt_blocks", "Blocks whose bytes did not match; they were computed again"
        )
        self.engine_waiting = self._gauge("engine_waiting", "Sequences waiting for their turn")
        self.engine_running = self._gauge("engine_running", "Sequences running")
        self.engine_free_blocks = self._gauge("engine_free_blocks", "Free or reclaimable KV blocks")
        self.engine_total_blocks = self._gauge("engine_total_blocks", "KV blocks of the engine")
        self.engine_step_seconds = self._histogram("engine_step_seconds", "Duration of a step")
        self.engine_preemptions = self._counter("engine_preemptions", "Sequences preempted")
        self.engine_evictions = self._counter(
            "engine_evictions", "Cached KV blocks of the engine given up for others"
        )
        self.kv_link_up = self._gauge("kv_link_up", "1 while attached to a KV store node")

    def _declare_speculation(self) -> None:
        """Declare what drafts bring; accepted / drafted and emitted / rounds are the ratios."""
        self.speculation_rounds = self._counter(
            "speculation_rounds", "Drafts verified", "drafter", "version"
        )
        self.speculation_drafted_tokens = self._counter(
            "speculation_drafted_tokens", "Tokens proposed", "drafter", "version"
        )
        self.speculation_accepted_tokens = self._counter(
            "speculation_accepted_tokens", "Proposed tokens accepted", "drafter", "version"
        )
        self.speculation_emitted_tokens = self._counter(
            "speculation_emitted_tokens",
            "Tokens emitted by passes that verified a draft",
            *("drafter", "version"),
        )
        self.speculation_draft_seconds = self._counter(
            "speculation_draft_seconds", "Time spent on drafting", "drafter", "version"
        )
        self.speculation_by_version = (
            self.speculation_rounds,
            self.speculation_drafted_tokens,
            self.speculation_accepted_tokens,
            self.speculation_emitted_tokens,
            self.speculation_draft_seconds,
        )
        self.speculation_decisions = self._counter(
            "speculation_decisions", "Decisions of the controller", "drafter", "reason"
        )
        self.speculation_position_tried = self._counter(
            "speculation_position_tried",
            "Drafts with a token at this position behind an accepted one",
            *("drafter", "position"),
        )
        self.speculation_position_accepted = self._counter(
            "speculation_position_accepted",
            "Drafts whose token at this position was accepted",
            *("drafter", "position"),
        )
        self.speculation_predicted_rate = self._gauge(
            "speculation_predicted_tokens_per_second", "What the controller's last choice promised"
        )
        self.speculation_off_rate = self._gauge(
            "speculation_off_tokens_per_second", "What the same step promised without a draft"
        )
        self.speculation_state_bytes = self._gauge(
            "speculation_state_bytes", "Memory of what a drafter keeps for all sequences", "drafter"
        )
        self.speculation_state_nodes = self._gauge(
            "speculation_state_nodes",
            "Entries in what a drafter keeps for all sequences",
            "drafter",
        )

    def _declare_capture(self) -> None:
        self.capture_samples = self._counter("capture_samples", "Samples captured for training")
        self.capture_tokens = self._counter("capture_tokens", "Tokens captured, without context")
        self.capture_dropped = self._counter(
            "capture_dropped", "Captured samples that did not reach the stream", "reason"
        )
        self.capture_dropped.labels("backlog")
        self.capture_seconds = self._counter(
            "capture_seconds", "Processor time that capturing took the engine"
        )

    def _declare_kv_node(self) -> None:
        self.kv_node_blocks = self._gauge("kv_node_blocks", "Readable blocks")
        self.kv_node_used_bytes = self._gauge("kv_node_used_bytes", "Bytes of readable blocks")
        self.kv_node_capacity_bytes = self._gauge(
            "kv_node_capacity_bytes", "Bytes the arena can hold"
        )
        self.kv_node_pinned_blocks = self._gauge(
            "kv_node_pinned_blocks", "Blocks pinned by readers"
        )
        self.kv_node_reserved_slots = self._gauge(
            "kv_node_reserved_slots", "Slots reserved by writers"
        )
        self.kv_node_sessions = self._gauge("kv_node_sessions", "Open sessions")
        self.kv_node_index_pending = self._gauge(
            "kv_node_index_pending", "Index changes not published yet"
        )
        self.kv_node_index_up = self._gauge("kv_node_index_up", "1 while the index answers")
        self.kv_node_committed_blocks = self._counter(
            "kv_node_committed_blocks", "Blocks committed by workers"
        )
        self.kv_node_acquired_blocks = self._counter(
            "kv_node_acquired_blocks", "Blocks handed to workers"
        )
        self.kv_node_missed_blocks = self._counter(
            "kv_node_missed_blocks", "Blocks asked for and not there"
        )
        self.kv_node_pulled_blocks = self._counter(
            "kv_node_pulled_blocks", "Blocks received from other nodes"
        )
        self.kv_node_pulled_bytes = self._counter(
            "kv_node_pulled_bytes", "Bytes received from other nodes"
        )
        self.kv_node_served_blocks = self._counter(
            "kv_node_served_blocks", "Blocks sent to other nodes"
        )
        self.kv_node_evicted_blocks = self._counter("kv_node_evicted_blocks", "Blocks evicted")
        self.kv_node_corrupt_blocks = self._counter(
            "kv_node_corrupt_blocks", "Blocks dropped for a wrong checksum"
        )
        self.kv_node_failed_pulls = self._counter(
            "kv_node_failed_pulls", "Pulls that did not bring everything"
        )

    def _declare_draft_link(self) -> None:
        """Declare what carries drafts and slack between workers and the trainer."""
        self.trainer_workers = self._gauge("trainer_workers", "Workers that attend")
        self.trainer_plan_number = self._gauge(
            "trainer_plan_number", "Changes since the start of what workers are to draft with"
        )
        self.trainer_sent_bytes = self._counter("trainer_sent_bytes", "Bytes of drafts sent")
        self.trainer_link_up = self._gauge("trainer_link_up", "1 while attending at the trainer")
        self.draft_fetches = self._counter("draft_fetches", "Drafts fetched from the trainer")
        self.draft_fetched_bytes = self._counter(
            "draft_fetched_bytes", "Bytes of drafts fetched from the trainer"
        )
        self.draft_fetch_failures = self._counter(
            "draft_fetch_failures", "Fetches that brought no draft that can be used", "reason"
        )
        self.draft_swaps = self._counter("draft_swaps", "Changes of what the engine drafts with")
        self.draft_swap_stall_seconds = self._gauge(
            "draft_swap_stall_max_seconds", "Longest time that a change kept a step waiting"
        )
        self.draft_outcomes_dropped = self._counter(
            "draft_outcomes_dropped", "Outcomes of sequences that no trainer heard of in time"
        )

    def _declare_training(self) -> None:
        """Declare what the trainer learns, decides and spends."""
        self.trainer_samples = self._counter("trainer_samples", "Samples taken in")
        self.trainer_corrupt_samples = self._counter(
            "trainer_corrupt_samples", "Samples dropped as corrupt"
        )
        self.trainer_micro_steps = self._counter("trainer_micro_steps", "Micro-steps of training")
        self.trainer_steps = self._counter("trainer_steps", "Optimiser steps")
        self.trainer_tokens = self._counter("trainer_tokens", "Tokens learned from, each time")
        self.trainer_trained_seconds = self._counter(
            "trainer_trained_seconds", "Seconds spent in micro-steps"
        )
        self.trainer_skipped_batches = self._counter(
            "trainer_skipped_batches", "Batches dropped for numbers that were not finite"
        )
        self.trainer_restored_weights = self._counter(
            "trainer_restored_weights", "Times that the last good weights came back"
        )
        self.trainer_save_failures = self._counter(
            "trainer_save_failures", "Times that the learner's state could not be saved"
        )
        self.trainer_loss = self._gauge("trainer_loss", "Loss of the last optimiser step")
        self.trainer_micro_step_seconds = self._gauge(
            "trainer_micro_step_seconds", "Duration of the last micro-step"
        )
        self.trainer_replay_bytes = self._gauge("trainer_replay_bytes", "Memory of samples kept")
        self.trainer_granted_threads = self._gauge(
            "trainer_granted_threads", "Threads that training may use now"
        )
        self.trainer_spare_offered_seconds = self._gauge(
            "trainer_spare_offered_core_seconds", "Core seconds that workers left since the start"
        )
        self.trainer_spare_granted_seconds = self._gauge(
            "trainer_spare_granted_core_seconds", "Core seconds granted to training of those"
        )
        self.trainer_spare_share = self._gauge(
            "trainer_spare_share_ratio", "Part of the spare core seconds granted to training"
        )
        self.trainer_yields = self._gauge(
            "trainer_yields", "Times since the start that a running grant was taken back"
        )
        self.trainer_yield_seconds = self._histogram(
            "trainer_yield_seconds",
            "Processor time that the learner still used after a grant was taken back",
        )
        self.draft_decisions = self._counter(
            "draft_decisions", "Decisions about versions of drafts", "drafter", "stage", "reason"
        )
        self.draft_tried_tokens = self._counter(
            "draft_tried_tokens",
            "Positions at which a version's token was put to the test",
            "drafter",
            "version",
        )
        self.draft_accepted_tokens = self._counter(
            "draft_accepted_tokens",
            "Positions at which a version's token was accepted",
            "drafter",
            "version",
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"paceline_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"paceline_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(
            f"paceline_{name}", text, labels, registry=self.registry, buckets=LATENCY_BUCKETS_S
        )


class MetricsServer:
    """A /metrics endpoint on its own thread."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, host, metrics.registry)
        except OSError as error:
            text = error.strerror or str(error)
            raise OSError(f"cannot serve metrics on {host}:{port}: {text}") from error
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(metrics: Metrics, host: str, port: int) -> MetricsServer:
    """Serve /metrics at host:port; port 0 takes any free one, see `.port`.

    Raises:
        OSError: the address cannot be bound; the message says why.
    """
    return MetricsServer(metrics, host, port)
