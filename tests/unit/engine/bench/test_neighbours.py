"""What others do is told from what this process does."""

from __future__ import annotations

import pytest

from paceline.engine.bench import neighbours
from paceline.engine.bench.neighbours import Neighbours


def test_the_share_is_of_all_processors_and_without_our_own_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocks = {"busy": 1000.0, "own": 5.0, "wall": 70.0}
    monkeypatch.setattr(neighbours, "_busy_s", lambda: clocks["busy"])
    monkeypatch.setattr(neighbours, "_own_s", lambda: clocks["own"])
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: clocks["wall"])
    monkeypatch.setattr(neighbours.os, "cpu_count", lambda: 4)
    watch = Neighbours()
    clocks.update(busy=1030.0, own=25.0, wall=80.0)
    # 40 s of four processors: 30 busy, of which 20 ours.
    assert watch.cpu_share() == 0.25


def test_where_nobody_counts_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_busy_s", lambda: 0.0)
    assert Neighbours().cpu_share() is None
