"""Makes the metrics of one process from their declarations.

One `Metrics` per process, made in its main and passed down. It exports what the areas say that
this process exports; the rest exists, so that shared code need not ask, and is seen by nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics

from paceline import __version__
from paceline.process.metrics.autoscaler import AutoscalerArea
from paceline.process.metrics.declaration import SERVICES, Area, Declared
from paceline.process.metrics.drafts import DraftArea
from paceline.process.metrics.gateway import GatewayArea
from paceline.process.metrics.kvstore import KvStoreArea
from paceline.process.metrics.platform import PlatformArea
from paceline.process.metrics.speculation import SpeculationArea
from paceline.process.metrics.trainer import TrainerArea
from paceline.process.metrics.watch import watch_delay, watch_gc
from paceline.process.metrics.worker import WorkerArea

AREAS: tuple[type[Area], ...] = (
    PlatformArea,
    GatewayArea,
    WorkerArea,
    SpeculationArea,
    DraftArea,
    KvStoreArea,
    TrainerArea,
    AutoscalerArea,
)


class Metrics(
    PlatformArea,
    GatewayArea,
    WorkerArea,
    SpeculationArea,
    DraftArea,
    KvStoreArea,
    TrainerArea,
    AutoscalerArea,
):
    """All metrics; a process touches those of its part."""

    def __init__(self, service: str, model: str = "") -> None:
        """Export what `service` does, everything where it is none of `SERVICES`."""
        # They double the series of counters and histograms and tell nothing that `up` does not.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        open_ended: list[str] = []
        # Memory, CPU time, start and open files of the process, under their usual names.
        ProcessCollector(registry=self.registry)
        for declared in all_declared():
            is_exported = service not in SERVICES or service in declared.area.exported_by
            registry = self.registry if is_exported else None
            setattr(self, declared.attribute, declared.make(registry, self._overflow(declared)))
            if is_exported and any(label.is_open for label in declared.labels):
                open_ended.append(declared.name)
        for name in open_ended:
            self.metrics_label_overflow.labels(name)
        self.build_info.labels(service, model, __version__).set(1)

    def watch_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Report the tasks and delays of a loop, and the collections of the process."""
        # Tasks are counted when scraped, on the scraping thread.
        self.tasks.set_function(lambda: len(asyncio.all_tasks(loop)))
        watch_delay(loop, self.event_loop_delay_seconds.observe)
        watch_gc(self)

    def _overflow(self, declared: Declared[Any]) -> Callable[[], None]:
        return lambda: self.metrics_label_overflow.labels(declared.name).inc()


def all_declared() -> Iterator[Declared[Any]]:
    """Yield every metric of the platform."""
    for area in AREAS:
        yield from area.declared()
