"""Labels whose number of values is bounded, and metrics that hold to it.

Values come from clients, from names that operators choose and from versions that never end; each
new one is a series that Prometheus keeps. Beyond a bound all open labels of a metric read `other`,
and that is counted.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from prometheus_client.metrics import MetricWrapperBase

OTHER = "other"
"""Stands for every value beyond the bound."""

M = TypeVar("M", bound=MetricWrapperBase)


@dataclass(frozen=True, slots=True)
class Label:
    """A label as declared."""

    name: str
    text: str
    """What its values mean."""
    values: tuple[str, ...] = ()
    """Those known beforehand; they have a place whatever comes."""
    max_values: int = 0
    """Most values at a time, `other` aside; 0: no others than the known ones."""

    @property
    def limit(self) -> int:
        """Most values at a time, `other` aside."""
        return max(self.max_values, len(self.values))

    @property
    def is_open(self) -> bool:
        """Whether it takes values that are not known beforehand."""
        return self.max_values > 0


def max_series(labels: tuple[Label, ...], limit: int | None) -> int:
    """Return how many combinations of values a metric has at most, those with `other` included."""
    product = math.prod(label.limit for label in labels)
    others = math.prod(label.limit for label in labels if not label.is_open)
    kept = product if limit is None else min(product, limit)
    return kept + (others if any(label.is_open for label in labels) else 0)


class Labelled(Generic[M]):
    """A metric with labels. One dictionary lookup per call once a series exists."""

    def __init__(
        self,
        metric: M,
        labels: tuple[Label, ...],
        on_overflow: Callable[[], None],
        limit: int | None = None,
    ) -> None:
        """`limit` bounds the combinations of values where their product would be too many."""
        self._metric = metric
        self._labels = labels
        self._on_overflow = on_overflow
        self._limit = limit
        self._children: dict[tuple[object, ...], M] = {}
        self._lock = threading.Lock()

    def labels(self, *values: object) -> M:
        """Return the series of these values, in the order of the declaration."""
        child = self._children.get(values)
        return self._admit(values) if child is None else child

    def remove(self, *values: object) -> None:
        """Forget a series; its values give their places back."""
        names = _names(values)
        with self._lock:
            self._children = {
                key: child for key, child in self._children.items() if _names(key) != names
            }
            self._metric.remove(*names)

    def _admit(self, values: tuple[object, ...]) -> M:
        names = _names(values)
        with self._lock:
            has_room = self._has_room(names)
            if not has_room:
                names = tuple(
                    OTHER if label.is_open or name not in label.values else name
                    for label, name in zip(self._labels, names, strict=True)
                )
            child = self._metric.labels(*names)
            if has_room:
                self._children[values] = child
        if not has_room:
            self._on_overflow()
        return child

    def _has_room(self, names: tuple[str, ...]) -> bool:
        if self._limit is not None and len(self._children) >= self._limit:
            return False
        return all(
            name in taken or len(taken) < label.limit
            for label, name, taken in zip(self._labels, names, self._taken(), strict=True)
        )

    def _taken(self) -> list[set[str]]:
        """Return the values of each label that have a place."""
        return [
            {str(key[index]) for key in self._children}.union(label.values)
            for index, label in enumerate(self._labels)
        ]


def _names(values: tuple[object, ...]) -> tuple[str, ...]:
    return tuple(map(str, values))
