"""What a metric is before a process makes it: name, meaning, unit, labels, buckets.

The area files beside this one declare metrics as class attributes; the attribute's name is the
metric's. book.py makes them, page.py writes docs/metrics.md from them, so that nothing about a
metric is said twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, ClassVar, Generic, TypeVar, overload

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from paceline.process.metrics.labelled import Label, Labelled, max_series

PREFIX = "paceline_"

LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4,
    0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
"""From half a millisecond (small models) up; common SLO thresholds are exact edges."""

TOKEN_BUCKETS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000,
)  # fmt: skip
"""1-2-5 series, to the longest contexts in use."""

M = TypeVar("M")

SERVICES = ("gateway", "worker", "kvstore", "trainer", "autoscaler")
"""Processes that export metrics."""


class Declared(Generic[M]):
    """One declared metric. On a class it is itself, on an instance of `Metrics` what was made."""

    def __init__(
        self,
        kind: type[Counter] | type[Gauge] | type[Histogram],
        text: str,
        unit: str,
        labels: tuple[Label, ...],
        *,
        buckets: tuple[float, ...] = (),
        zeros: Iterable[tuple[str, ...]] | None = None,
        limit: int | None = None,
    ) -> None:
        self.kind = kind
        self.text = text
        self.unit = unit
        self.labels = labels
        self.buckets = buckets
        self.zeros = tuple(product(*(each.values for each in labels)) if zeros is None else zeros)
        """Label values whose series exist from the start."""
        self.limit = limit
        """Most combinations of label values, where their product would be too many."""
        self.area: type[Area]
        self.attribute = ""

    def __set_name__(self, owner: type[Area], name: str) -> None:
        self.area, self.attribute = owner, name

    @overload
    def __get__(self, made: None, owner: type) -> Declared[M]: ...
    @overload
    def __get__(self, made: Area, owner: type) -> M: ...
    def __get__(self, made: Area | None, owner: type) -> Declared[M] | M:
        # An instance has the made metric under the same name, which Python finds first.
        return self

    @property
    def name(self) -> str:
        """The metric's name as it is queried, without _bucket, _sum and _count."""
        return f"{PREFIX}{self.attribute}{'_total' if self.kind is Counter else ''}"

    @property
    def max_series(self) -> int:
        """Most series in one process."""
        per_combination = len(self.buckets) + 3 if self.buckets else 1
        return max_series(self.labels, self.limit) * per_combination

    def make(
        self, registry: CollectorRegistry | None, on_overflow: Callable[[], None]
    ) -> Counter | Gauge | Histogram | Labelled[Any]:
        """Return the metric of one process; on no registry where it does not export it."""
        options: dict[str, Any] = {"buckets": self.buckets} if self.buckets else {}
        names = [label.name for label in self.labels]
        metric = self.kind(
            f"{PREFIX}{self.attribute}", self.text, names, registry=registry, **options
        )
        if not self.labels:
            return metric
        labelled: Labelled[Any] = Labelled(metric, self.labels, on_overflow, self.limit)
        for values in self.zeros:
            labelled.labels(*values)
        return labelled


class Area:
    """Metrics that belong together; its public attributes are `Declared`."""

    title: ClassVar[str]
    exported_by: ClassVar[frozenset[str]]

    @classmethod
    def declared(cls) -> list[Declared[Any]]:
        """Return the metrics of this area, in the order of the file."""
        return [each for each in vars(cls).values() if isinstance(each, Declared)]


@overload
def counter(text: str, unit: str) -> Declared[Counter]: ...
@overload
def counter(
    text: str,
    unit: str,
    *labels: Label,
    zeros: Iterable[tuple[str, ...]] | None = None,
    limit: int | None = None,
) -> Declared[Labelled[Counter]]: ...
def counter(
    text: str,
    unit: str,
    *labels: Label,
    zeros: Iterable[tuple[str, ...]] | None = None,
    limit: int | None = None,
) -> Declared[Counter] | Declared[Labelled[Counter]]:
    """Declare what only grows.

    `zeros` replaces the product of the labels' known values as what exists from the start, `limit`
    their product as the most combinations.
    """
    return Declared(Counter, text, unit, labels, zeros=zeros, limit=limit)


@overload
def gauge(text: str, unit: str) -> Declared[Gauge]: ...
@overload
def gauge(text: str, unit: str, *labels: Label) -> Declared[Labelled[Gauge]]: ...
def gauge(text: str, unit: str, *labels: Label) -> Declared[Gauge] | Declared[Labelled[Gauge]]:
    """Declare what goes up and down."""
    return Declared(Gauge, text, unit, labels)


@overload
def seconds(text: str) -> Declared[Histogram]: ...
@overload
def seconds(text: str, *labels: Label) -> Declared[Labelled[Histogram]]: ...
def seconds(text: str, *labels: Label) -> Declared[Histogram] | Declared[Labelled[Histogram]]:
    """Declare a distribution of durations."""
    return Declared(Histogram, text, "seconds", labels, buckets=LATENCY_BUCKETS_S)


def tokens(text: str) -> Declared[Histogram]:
    """Declare a distribution of token counts."""
    return Declared(Histogram, text, "tokens", (), buckets=TOKEN_BUCKETS)
