"""Metrics of a KV node: its arena, what it exchanges, and how true the index is to it."""

from __future__ import annotations

from paceline.process.metrics.declaration import Area, counter, gauge, seconds


class KvStoreArea(Area):
    """One node; copied from its books once a second."""

    title = "KV store nodes"
    exported_by = frozenset({"kvstore"})

    kv_node_blocks = gauge("Readable blocks.", "blocks")
    kv_node_used_bytes = gauge("Prefix cache: bytes of readable blocks.", "bytes")
    kv_node_capacity_bytes = gauge("Bytes that the arena can hold.", "bytes")
    kv_node_pinned_blocks = gauge("Blocks pinned by readers.", "blocks")
    kv_node_reserved_slots = gauge("Slots reserved by writers.", "slots")
    kv_node_committed_blocks = counter("Blocks committed by workers.", "blocks")
    kv_node_acquired_blocks = counter("Blocks handed to workers.", "blocks")
    kv_node_missed_blocks = counter("Blocks asked for and not to be had.", "blocks")
    kv_node_evicted_blocks = counter("Blocks evicted.", "blocks")
    kv_node_corrupt_blocks = counter("Blocks dropped for a wrong checksum.", "blocks")
    kv_node_pulled_blocks = counter("Blocks received from other nodes.", "blocks")
    kv_node_pulled_bytes = counter("Bytes received from other nodes.", "bytes")
    kv_node_pull_seconds = seconds("Duration of fetches from other nodes, failed ones included.")
    kv_node_failed_pulls = counter("Pulls that did not bring everything.", "pulls")
    kv_node_served_blocks = counter("Blocks sent to other nodes.", "blocks")
    kv_node_index_up = gauge("1 while the index answers.", "")
    kv_node_index_pending = gauge("Index changes not published yet.", "blocks")
    kv_node_index_rebuilds = counter(
        "Times that all blocks of a layout were published anew: at the start, and where the index "
        "had lost them or too many changes waited.",
        "rebuilds",
    )
    kv_node_index_misses = counter(
        "Blocks that the index promised to another node and that were not there.", "blocks"
    )
