"""Reports of speculation cross the socket now and then, and their differences become metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.spec.report import (
    REPORT_PERIOD_S,
    DrafterReport,
    PacedReport,
    SpeculationReport,
)
from paceline.process.metrics import Metrics
from paceline.process.metrics.speculation import MAX_POSITIONS, MAX_VERSIONS
from paceline.v1 import engine_pb2
from paceline.worker.bridge import EngineBridge
from paceline.worker.speculation import (
    SpeculationMetrics,
    report_from_proto,
    report_to_proto,
)

COUNTS = st.integers(0, 2**63)
REALS = st.floats(allow_nan=False)
DRAFTERS = st.builds(
    DrafterReport,
    name=st.text(),
    version=st.text(),
    rounds=COUNTS,
    drafted=COUNTS,
    accepted=COUNTS,
    emitted=COUNTS,
    draft_s=REALS,
    tried_by_depth=st.lists(COUNTS).map(tuple),
    accepted_by_depth=st.lists(COUNTS).map(tuple),
    state_bytes=COUNTS,
    state_nodes=COUNTS,
)
REPORTS = st.builds(
    SpeculationReport,
    drafters=st.lists(DRAFTERS, max_size=4).map(tuple),
    decisions=st.dictionaries(st.tuples(st.text(), st.text()), COUNTS, max_size=4),
    predicted_rate=REALS,
    off_rate=REALS,
    draft_version=st.text(),
)


@settings(max_examples=50)
@given(REPORTS)
def test_reports_survive_the_wire(report: SpeculationReport) -> None:
    data = report_to_proto(report).SerializeToString()
    assert report_from_proto(engine_pb2.SpeculationReport.FromString(data)) == report


def test_a_report_is_made_anew_only_when_it_is_old() -> None:
    numbers = iter(range(9))
    paced = PacedReport(lambda: SpeculationReport(off_rate=float(next(numbers))))
    first = paced.at(100.0)
    assert paced.at(100.0 + 0.9 * REPORT_PERIOD_S) is first
    second = paced.at(100.0 + REPORT_PERIOD_S)
    assert (first.off_rate, second.off_rate) == (0.0, 1.0)
    assert paced.at(100.0 + 1.9 * REPORT_PERIOD_S) is second


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Return all samples of speculation by name and label values."""
    return {
        (sample.name.removeprefix("paceline_speculation_"), *sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name.startswith("paceline_speculation_") and not sample.name.endswith("_created")
    }


TRIE = DrafterReport("trie", rounds=4, drafted=20, accepted=7, emitted=11, draft_s=0.25)
MODEL = DrafterReport(
    "model", "v1", 10, 60, 30, 40, 1.5, tuple(range(20, 0, -2)), tuple(range(10, 0, -1)), 99, 5
)
REPORT = SpeculationReport(
    (TRIE, MODEL), {("trie", "on"): 3, ("model", "off"): 2}, 950.0, 640.0, "v1"
)


def test_counters_follow_the_engines_counts() -> None:
    metrics = Metrics("test")
    watch = SpeculationMetrics(metrics)
    watch.note(REPORT)
    watch.note(REPORT)
    more = replace(
        REPORT,
        drafters=(replace(TRIE, rounds=9, drafted=22, accepted_by_depth=(1,)), MODEL),
        decisions={("trie", "on"): 5, ("model", "off"): 2, ("model", "forced"): 1},
        predicted_rate=1000.0,
    )
    watch.note(more)
    got = samples(metrics)
    assert got["rounds_total", "trie", ""] == 9
    assert got["drafted_tokens_total", "trie", ""] == 22
    assert got["accepted_tokens_total", "trie", ""] == 7
    assert got["emitted_tokens_total", "model", "v1"] == 40
    assert got["draft_seconds_total", "model", "v1"] == 1.5
    assert got["decisions_total", "trie", "on"] == 5
    assert got["decisions_total", "model", "off"] == 2
    assert got["decisions_total", "model", "forced"] == 1
    assert got["decisions_total", "trie", "explore"] == 0, "known reasons begin at 0"
    assert got["position_accepted_total", "trie", "1"] == 1
    assert (got["predicted_tokens_per_second",], got["off_tokens_per_second",]) == (1000, 640)
    assert (got["state_bytes", "model"], got["state_nodes", "model"]) == (99, 5)
    for depth in range(MAX_POSITIONS):
        assert got["position_tried_total", "model", str(depth + 1)] == 20 - 2 * depth
        assert got["position_accepted_total", "model", str(depth + 1)] == 10 - depth
    assert ("position_tried_total", "model", str(MAX_POSITIONS + 1)) not in got


def test_versions_of_a_drafter_are_counted_apart() -> None:
    metrics = Metrics("test")
    watch = SpeculationMetrics(metrics)
    trial = replace(MODEL, version="v2", drafted=15, accepted=3)
    watch.note(SpeculationReport((MODEL,)))
    watch.note(SpeculationReport((replace(MODEL, drafted=70), trial)))
    watch.note(SpeculationReport((trial,)))
    watch.note(SpeculationReport((replace(trial, drafted=25), replace(MODEL, drafted=5))))
    got = samples(metrics)
    assert got["drafted_tokens_total", "model", "v1"] == 75, "v1 came back with new counts"
    assert got["drafted_tokens_total", "model", "v2"] == 25
    assert (watch.num_drafted, watch.num_accepted) == (100, 63)


def test_however_many_versions_there_were_series_stay_few() -> None:
    metrics = Metrics("test")
    watch = SpeculationMetrics(metrics)
    versions = [f"v{i}" for i in range(50)]
    for i, version in enumerate([*versions, "v48"], start=1):
        watch.note(SpeculationReport((replace(MODEL, version=version, drafted=60 * i),)))
    got = samples(metrics)
    kept = {key[2]: value for key, value in got.items() if key[0] == "drafted_tokens_total"}
    assert kept == {"v46": 60 * 47, "v47": 60 * 48, "v48": 60 * (49 + 51), "v49": 60 * 50}
    assert len(kept) == MAX_VERSIONS
    watch.note(SpeculationReport((replace(MODEL, version="v50", drafted=60 * 52),)))
    assert ("rounds_total", "model", "v48") in samples(metrics), "it was in use a moment ago"


@pytest.mark.parametrize("value", [math.inf, 0.0])
def test_odd_rates_do_no_harm(value: float) -> None:
    metrics = Metrics("test")
    watch = SpeculationMetrics(metrics)
    watch.note(REPORT)
    watch.note(replace(REPORT, predicted_rate=value, drafters=(replace(TRIE, drafted=1),)))
    got: Any = samples(metrics)
    assert got["predicted_tokens_per_second",] == value
    assert got["drafted_tokens_total", "trie", ""] == 20, "counters never fall"


def test_the_load_of_a_worker_tells_what_was_accepted() -> None:
    bridge = EngineBridge(Metrics("test"), max_requests=1)
    load = engine_pb2.EngineLoad(num_running=1, num_steps=1)
    load.speculation.CopyFrom(report_to_proto(REPORT))
    bridge._note_load(load)
    assert (bridge.load.drafted_tokens, bridge.load.accepted_tokens) == (80, 37)
    assert bridge.draft_version == "v1"
    # Most loads come without a report.
    bridge._note_load(engine_pb2.EngineLoad(num_running=2, num_steps=2))
    assert (bridge.load.num_running, bridge.load.drafted_tokens) == (2, 80)
