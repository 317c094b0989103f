"""Metrics are declared whole, exported by whom they belong to, bounded, and start at 0."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from paceline.process.metrics import Metrics
from paceline.process.metrics.book import AREAS, all_declared
from paceline.process.metrics.declaration import SERVICES, Declared
from paceline.process.metrics.labelled import OTHER, Label, Labelled, max_series
from paceline.process.metrics.page import render
from paceline.process.metrics.watch import watch_gc
from tests.promtool import promtool
from tests.waiting import until

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"

TARGET_LABELS = {"job", "instance", "role", "member", "fleet", "model", "le", "quantile"}

UNITS_IN_NAMES = {"seconds", "bytes", "ratio", "tokens", "core seconds", "tokens per second"}

DECLARED = {declared.name: declared for declared in all_declared()}


def exported(service: str) -> dict[str, Declared[Any]]:
    return {n: d for n, d in DECLARED.items() if service in d.area.exported_by}


def touch(metrics: Metrics) -> None:
    """Give every metric a series."""
    for declared in all_declared():
        metric = getattr(metrics, declared.attribute)
        if isinstance(metric, Labelled):
            metric.labels(*(label.values[0] if label.values else "v" for label in declared.labels))


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.mark.parametrize("declared", DECLARED.values(), ids=DECLARED)
def test_a_declaration_says_everything(declared: Declared[Any]) -> None:
    bare = declared.name.removesuffix("_total")
    assert declared.text.endswith("."), "a sentence"
    if declared.unit in UNITS_IN_NAMES:
        assert bare.endswith(declared.unit.replace(" ", "_"))
    elif not declared.unit:
        assert bare.endswith(("_up", "_info")), "a number needs a unit"
    for unit in ("seconds", "bytes", "ratio"):
        assert not bare.endswith(f"_{unit}") or declared.unit.endswith(unit)
    assert not {label.name for label in declared.labels} & TARGET_LABELS
    for label in declared.labels:
        assert label.text
        assert label.values or label.is_open, "no value would ever have a place"
    assert declared.max_series <= 800


@pytest.mark.parametrize("service", SERVICES)
def test_a_process_exports_what_is_its_own(service: str) -> None:
    metrics = Metrics(service, "m")
    touch(metrics)
    page = generate_latest(metrics.registry).decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    ours = {n: f for n, f in families.items() if not n.startswith("process_")}
    assert {*ours} == {name.removesuffix("_total") for name in exported(service)}
    for name, declared in exported(service).items():
        family = ours[name.removesuffix("_total")]
        assert family.documentation == declared.text
        assert family.type == declared.kind.__name__.lower()
        assert family.samples, "touched, and no series"
        assert not any(sample.name.endswith("_created") for sample in family.samples)
    promtool("check", "metrics", text=page)


def test_areas_belong_to_processes_that_exist() -> None:
    for area in AREAS:
        assert area.title
        assert area.exported_by <= {*SERVICES}
    names = [declared.attribute for declared in all_declared()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("service", SERVICES)
def test_counters_begin_at_0(service: str) -> None:
    metrics = Metrics(service)
    for name, declared in exported(service).items():
        if declared.kind is not Counter:
            continue
        for values in declared.zeros:
            labels = dict(zip([each.name for each in declared.labels], values, strict=True))
            assert value(metrics, name, **labels) == 0
        knows_all = all(label.values for label in declared.labels)
        assert declared.zeros or not knows_all, f"{name} has no series before the first event"


def test_known_reasons_begin_at_0() -> None:
    trainer = Metrics("trainer")
    labels = {"drafter": "model", "stage": "rolled-back", "reason": "live-worse"}
    assert value(trainer, "paceline_draft_decisions_total", **labels) == 0
    labels = {"drafter": "model", "stage": "refused", "reason": "live-worse"}
    assert value(trainer, "paceline_draft_decisions_total", **labels) is None, "cannot happen"


# -- bounds -----------------------------------------------------------------------------------


def bounded(*labels: Label, limit: int | None = None) -> tuple[Labelled[Counter], Any, list[str]]:
    """Return a metric, a function that reads it, and its overflows."""
    registry, overflows = CollectorRegistry(), list[str]()
    metric = Counter("c", "Text.", [label.name for label in labels], registry=registry)
    made = Labelled(metric, labels, lambda: overflows.append("one"), limit)

    def series() -> dict[tuple[str, ...], float]:
        return {
            tuple(s.labels[label.name] for label in labels): s.value
            for family in registry.collect()
            for s in family.samples
            if s.name == "c_total"
        }

    return made, series, overflows


def test_values_beyond_the_bound_are_other() -> None:
    metric, series, overflows = bounded(Label("d", "Text", max_values=3))
    for round_ in range(2):
        for index in range(10):
            metric.labels(f"d{index}").inc()
        assert series() == {("d0",): round_ + 1, ("d1",): round_ + 1, ("d2",): round_ + 1} | {
            (OTHER,): 7 * (round_ + 1)
        }
    assert len(overflows) == 14


def test_known_values_keep_their_place() -> None:
    metric, series, overflows = bounded(Label("d", "Text", ("known",), max_values=2))
    for name in ("a", "b", "known"):
        metric.labels(name).inc()
    assert series() == {("a",): 1, (OTHER,): 1, ("known",): 1}
    assert len(overflows) == 1


def test_a_closed_label_takes_no_other_value() -> None:
    metric, series, overflows = bounded(Label("kind", "Text", ("a", "b")))
    metric.labels("c").inc()
    metric.labels("a").inc()
    assert series() == {(OTHER,): 1, ("a",): 1}
    assert len(overflows) == 1


def test_combinations_are_bounded_too() -> None:
    labels = (
        Label("method", "Text", max_values=8),
        Label("code", "Text", ("ok", "bad")),
        Label("reason", "Text", max_values=8),
    )
    metric, series, _ = bounded(*labels, limit=10)
    for index in range(64):
        metric.labels(f"m{index % 8}", "bad", f"r{index // 8}").inc()
    found = series()
    assert found[OTHER, "bad", OTHER] == 54, "closed labels keep their value"
    assert len(found) == 11 <= max_series(labels, 10) == 12
    assert sum(found.values()) == 64


def test_a_removed_series_gives_its_place_back() -> None:
    metric, series, overflows = bounded(Label("v", "Text", max_values=2))
    metric.labels(1).inc()
    metric.labels("1").inc()
    metric.labels("2").inc()
    metric.remove("1")
    metric.labels("3").inc()
    assert series() == {("2",): 1, ("3",): 1}
    metric.labels("1").inc()
    assert (series()[OTHER,], len(overflows)) == (1, 1)


def test_a_wrong_number_of_labels_is_an_error() -> None:
    metric, _, _ = bounded(Label("a", "Text", max_values=2), Label("b", "Text", max_values=2))
    for values in ((), ("x",), ("x", "y", "z")):
        with pytest.raises(ValueError):
            metric.labels(*values)


def test_an_overflow_is_counted_by_metric() -> None:
    metrics, name = Metrics("trainer"), "paceline_draft_domain_tried_tokens_total"
    overflow = "paceline_metrics_label_overflow_total"
    assert value(metrics, overflow, metric=name) == 0
    for index in range(40):
        metrics.draft_domain_tried_tokens.labels(f"d{index}").inc(2)
    assert value(metrics, overflow, metric=name) == 8
    assert value(metrics, name, domain=OTHER) == 16


# -- the interpreter --------------------------------------------------------------------------


async def test_a_late_event_loop_is_seen() -> None:
    metrics = Metrics("gateway")
    metrics.watch_loop(asyncio.get_running_loop())
    name = "paceline_event_loop_delay_seconds"
    await until(lambda: value(metrics, f"{name}_count"))
    time.sleep(0.5)  # noqa: ASYNC251

    def is_seen() -> bool:
        total, quick = value(metrics, f"{name}_count"), value(metrics, f"{name}_bucket", le="0.25")
        return total is not None and quick is not None and total > quick

    await until(is_seen)


def test_collections_are_counted_as_long_as_somebody_looks() -> None:
    gc.collect()
    num_callbacks = len(gc.callbacks)
    metrics = Metrics("gateway")
    watch_gc(metrics)
    before = value(metrics, "paceline_gc_collections_total", generation="2") or 0
    gc.collect()
    assert value(metrics, "paceline_gc_collections_total", generation="2") == before + 1
    assert (value(metrics, "paceline_gc_seconds_total", generation="2") or 0) > 0
    assert len(gc.callbacks) == num_callbacks + 1
    del metrics
    gc.collect()
    assert len(gc.callbacks) == num_callbacks


def test_the_page_is_what_the_declarations_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `make metrics-page`"
