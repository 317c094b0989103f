"""`python -m paceline.process.metrics.page` prints docs/metrics.md; `make check` compares."""

from __future__ import annotations

import sys
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from paceline.process.metrics.book import AREAS
from paceline.process.metrics.declaration import (
    LATENCY_BUCKETS_S,
    SERVICES,
    TOKEN_BUCKETS,
    Area,
    Declared,
)
from paceline.process.metrics.labelled import Label

_KINDS = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}

_HEAD = """# Metrics

Written by `make metrics-page` from `services/paceline/process/metrics/`; `make check` finds a
difference. Every process serves its own metrics at `/metrics`, beside the `process_*` of the
Prometheus client (memory, CPU time, open files, start). What they mean together is in
[operations.md](operations.md#metrics), alerts and recording rules are in `deploy/prometheus/`.

- Counters end in `_total` and start at 0 where label values are known beforehand. Histograms have
  `_bucket`, `_sum` and `_count`.
- A label takes the stated number of values at a time. Where one more comes, or `series` is
  reached, the open labels of the metric read `other`, and that is counted in
  `paceline_metrics_label_overflow_total`. `series` is the most that one process exports.
- The labels `role`, `member`, `fleet` and `model` are those of the scraped target
  (`deploy/prometheus/prometheus.yml`); no metric has such a label of its own.
- Durations have these bucket edges, in seconds: {latency}.
- Counts of tokens have these: {tokens}.
"""


def render() -> str:
    """Return the page."""
    latency = ", ".join(f"{edge:g}" for edge in LATENCY_BUCKETS_S)
    counts = ", ".join(f"{edge:,}" for edge in TOKEN_BUCKETS)
    parts = [_HEAD.format(latency=latency, tokens=counts)]
    parts += [_section(area) for area in AREAS if area.declared()]
    return "\n".join(parts)


def _section(area: type[Area]) -> str:
    services = [each for each in SERVICES if each in area.exported_by]
    lines = [
        f"## {area.title}",
        "",
        f"Exported by: {', '.join(services)}.",
        "",
        "| metric | type, unit | series | meaning |",
        "|---|---|---|---|",
        *(_row(declared) for declared in area.declared()),
    ]
    labels = dict.fromkeys(label for each in area.declared() for label in each.labels)
    if labels:
        lines += ["", *(_label(label) for label in labels)]
    return "\n".join(lines) + "\n"


def _row(declared: Declared[Any]) -> str:
    names = ",".join(label.name for label in declared.labels)
    name = f"`{declared.name}{{{names}}}`" if names else f"`{declared.name}`"
    kind = ", ".join(filter(None, (_KINDS[declared.kind], declared.unit)))
    return f"| {name} | {kind} | {declared.max_series} | {declared.text} |"


def _label(label: Label) -> str:
    known = ", ".join(f"`{value}`" for value in label.values)
    if not label.is_open:
        return f"- `{label.name}`: {label.text}. Values: {known}."
    begin = f" At first {known}." if known else ""
    return f"- `{label.name}`: {label.text}. At most {label.limit} values.{begin}"


if __name__ == "__main__":
    sys.stdout.write(render())
