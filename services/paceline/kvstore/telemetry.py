"""Copies the node's books and counters into metrics, once a second.

Books change thousands of times a second under load and are read every few seconds, so they
are sampled instead of instrumented. Names and help texts are in process/metrics.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from paceline.kvstore.node import KvNode
from paceline.kvstore.publisher import Publisher
from paceline.process.metrics import Metrics

PERIOD_S = 1.0


async def report_metrics(node: KvNode, publisher: Publisher, metrics: Metrics) -> None:
    """Report until cancelled."""
    report = Report(node, publisher, metrics)
    while True:
        report.update()
        await asyncio.sleep(PERIOD_S)


class Report:
    """Remembers what was reported, since metrics of counts only take increments."""

    def __init__(self, node: KvNode, publisher: Publisher, metrics: Metrics) -> None:
        self._node = node
        self._publisher = publisher
        self._metrics = metrics
        self._reported: dict[str, int] = {}

    def update(self) -> None:
        """Bring the metrics up to date."""
        metrics, usage, counters = self._metrics, self._node.usage(), self._node.counters
        metrics.kv_node_blocks.set(usage.num_blocks)
        metrics.kv_node_used_bytes.set(usage.used_bytes)
        metrics.kv_node_capacity_bytes.set(usage.capacity_bytes)
        metrics.kv_node_pinned_blocks.set(usage.num_pinned_blocks)
        metrics.kv_node_reserved_slots.set(usage.num_reserved_slots)
        metrics.kv_node_index_pending.set(self._publisher.num_pending)
        metrics.kv_node_index_up.set(self._publisher.is_connected)
        self._count("committed", counters.committed_blocks, metrics.kv_node_committed_blocks.inc)
        self._count("acquired", counters.acquired_blocks, metrics.kv_node_acquired_blocks.inc)
        self._count("missed", counters.missed_blocks, metrics.kv_node_missed_blocks.inc)
        self._count("pulled", counters.pulled_blocks, metrics.kv_node_pulled_blocks.inc)
        self._count("pulled_bytes", counters.pulled_bytes, metrics.kv_node_pulled_bytes.inc)
        self._count("served", counters.served_blocks, metrics.kv_node_served_blocks.inc)
        self._count("evicted", usage.num_evicted, metrics.kv_node_evicted_blocks.inc)
        self._count("corrupt", counters.corrupt_blocks, metrics.kv_node_corrupt_blocks.inc)
        self._count("failed_pulls", counters.failed_pulls, metrics.kv_node_failed_pulls.inc)
        self._count("promised", counters.promised_blocks, metrics.kv_node_index_misses.inc)
        rebuilds = self._publisher.num_rebuilds
        self._count("rebuilds", rebuilds, metrics.kv_node_index_rebuilds.inc)

    def _count(self, name: str, total: int, increase: Callable[[float], None]) -> None:
        increase(total - self._reported.get(name, 0))
        self._reported[name] = total
