"""Counts the KV that decode workers took from the store, also those that died meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from paceline.cli.http_get import http_get
from paceline.domain.member import Member, Role

_BLOCKS = "paceline_kv_loaded_blocks_total"
_BYTES = "paceline_kv_loaded_bytes_total"
_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Moved:
    """What was read from the store."""

    num_blocks: int = 0
    num_bytes: int = 0


class KvTally:
    """Remembers the last count of every process: counters end with it."""

    def __init__(self) -> None:
        self._by_process: dict[tuple[str, int], Moved] = {}

    async def update(self, members: list[Member]) -> None:
        """Read the counters of all decode workers; one that does not answer keeps its count."""
        workers = [member for member in members if member.role is Role.DECODE]
        for worker, moved in zip(
            workers, await asyncio.gather(*(_read(worker) for worker in workers)), strict=True
        ):
            if moved is not None:
                self._by_process[(worker.id, worker.pid)] = moved

    def total(self) -> Moved:
        """Return the sum over all processes."""
        all_moved = self._by_process.values()
        return Moved(sum(m.num_blocks for m in all_moved), sum(m.num_bytes for m in all_moved))


async def _read(worker: Member) -> Moved | None:
    url = f"http://{worker.metrics_address}/metrics"
    try:
        body = await asyncio.to_thread(http_get, url, _TIMEOUT_S)
    except OSError:
        return None
    return parse_moved(body.decode())


def parse_moved(text: str) -> Moved:
    """Return the counters from a Prometheus text."""
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in (_BLOCKS, _BYTES)
    }
    return Moved(int(values.get(_BLOCKS, 0)), int(values.get(_BYTES, 0)))
