"""Metrics of workers: the engine, its queue, and KV on its way from and to the store."""

from __future__ import annotations

from paceline.process.metrics.declaration import Area, counter, gauge, seconds
from paceline.process.metrics.labelled import Label


class WorkerArea(Area):
    """One engine and its link to a KV node."""

    title = "Workers: engine and KV"
    exported_by = frozenset({"worker"})

    queue_seconds = seconds("Arrival at the worker to the start of the first step.")
    engine_waiting = gauge("Sequences waiting for their turn.", "sequences")
    engine_running = gauge("Sequences running.", "sequences")
    engine_step_seconds = seconds("Duration of a step.")
    engine_preemptions = counter("Sequences preempted.", "sequences")
    engine_free_blocks = gauge("KV blocks free, or cached and reclaimable.", "blocks")
    engine_total_blocks = gauge("KV blocks of the engine.", "blocks")
    engine_cached_bytes = gauge(
        "Prefix cache: bytes of the engine's KV blocks that prompts can be found in.", "bytes"
    )
    engine_evictions = counter("Cached KV blocks of the engine given up for others.", "blocks")
    kv_link_up = gauge("1 while attached to a KV store node.", "")
    kv_saved_blocks = counter("Blocks written to the KV store.", "blocks")
    kv_saved_bytes = counter("Bytes written to the KV store.", "bytes")
    kv_loaded_blocks = counter("Blocks read from the KV store.", "blocks")
    kv_loaded_bytes = counter("Bytes read from the KV store.", "bytes")
    kv_transfer_seconds = seconds(
        "Time until blocks of one request are there.",
        Label(
            "direction",
            "`load`: asked for until pinned on this machine, fetching from other nodes included; "
            "`save`: written until readable",
            ("load", "save"),
        ),
    )
    kv_corrupt_blocks = counter(
        "Blocks whose bytes did not match; they were computed again.", "blocks"
    )
