"""Kept fits survive; whatever is not one counts as absent."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path

import pytest

from paceline.domain.cost import StepCost
from paceline.engine.cost_store import CostKey, CostStore, processor_fingerprint
from tests.unit.engine.test_cost import KEY, STREAMING


def file_of(directory: Path) -> Path:
    (path,) = directory.rglob("*.json")
    return path


@pytest.mark.parametrize("cost", [STREAMING, StepCost(1.0, 2.0, 3.0, 4.0)])
def test_a_fit_comes_back_as_it_was(tmp_path: Path, cost: StepCost) -> None:
    CostStore(tmp_path).save(KEY, cost)
    assert CostStore(tmp_path).load(KEY) == cost
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] == [".json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"{}",
        b'{"format": 1}',
        b'{"format": 1, "key": {}, "cost": {}}',
    ],
)
def test_a_file_that_is_no_fit_counts_as_absent(tmp_path: Path, content: bytes) -> None:
    store = CostStore(tmp_path)
    store.save(KEY, STREAMING)
    file_of(tmp_path).write_bytes(content)
    assert store.load(KEY) is None
    store.save(KEY, STREAMING)
    assert store.load(KEY) == STREAMING


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["cost"].pop("base_s"),
        lambda data: data["cost"]["curves"]["tokens"]["counts"].pop(),
        lambda data: data["cost"]["curves"]["rows"]["counts"].reverse(),
        lambda data: data["cost"].update(base_s="fast"),
        lambda data: data["key"].update(threads=99),
        lambda data: data.update(format=0),
    ],
)
def test_a_damaged_fit_counts_as_absent(tmp_path: Path, change: object) -> None:
    store = CostStore(tmp_path)
    store.save(KEY, STREAMING)
    data = json.loads(file_of(tmp_path).read_text())
    change(data)  # type: ignore[operator]
    file_of(tmp_path).write_text(json.dumps(data))
    assert store.load(KEY) is None


def test_a_directory_that_cannot_be_written_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    store = CostStore(tmp_path / "file")
    with caplog.at_level(logging.WARNING), store.exclusive(KEY):
        store.save(KEY, STREAMING)
        assert store.load(KEY) is None
    assert "step-cost-not-kept" in caplog.text


def _hold(directory: Path, key: CostKey, is_held: object, may_end: object) -> None:
    with CostStore(directory).exclusive(key):
        is_held.set()  # type: ignore[attr-defined]
        may_end.wait()  # type: ignore[attr-defined]
        CostStore(directory).save(key, STREAMING)


def test_one_process_at_a_time_measures(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    is_held, may_end = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(tmp_path, KEY, is_held, may_end))
    other.start()
    assert is_held.wait(60)
    may_end.set()
    store = CostStore(tmp_path)
    with store.exclusive(KEY):
        # Here only after the other has left, with what it measured.
        assert store.load(KEY) == STREAMING
    other.join(60)
    assert other.exitcode == 0


def test_a_processor_has_one_fingerprint() -> None:
    assert processor_fingerprint() == processor_fingerprint() != ""
    assert os.sep not in processor_fingerprint()
