"""A registry whose process dies, at any point: the state before the change or after it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline.domain.draft_records import DraftRecord, DraftStage
from paceline.trainer.registry import Registry
from tests.unit.trainer.draft_files_made import TARGET
from tests.unit.trainer.test_registry import Bench, check, leftovers

S = DraftStage


class Died(BaseException):
    """The process is gone."""


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Let the disk take `step` changes and no more, not even a clean-up; return what it took."""
    done: list[str] = []

    def mortal(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            if len(done) >= step:
                raise Died
            done.append(name)
            return call(*args, **kwargs)

        return run

    for module, names in (
        (os, ("replace", "rename", "fsync", "unlink")),
        (shutil, ("rmtree", "copyfile")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, mortal(name, getattr(module, name)))
    return done


def promote(bench: Bench) -> None:
    bench.registry.decide(bench.registry.records()[0].version, S.ACTIVE, "forced")


CHANGES: dict[str, Callable[[Bench], object]] = {
    "add": lambda bench: bench.add(7),
    "decide": promote,
    "rollback": lambda bench: bench.registry.rollback("model"),
    "pin": lambda bench: bench.registry.pin("model", bench.registry.records()[0].version),
    "floor": lambda bench: bench.floor(9),
}


def filled(place: Path) -> Bench:
    """A registry so full that what is added pushes something out."""
    bench = Bench(place, keep=5)
    bench.floor()
    bench.promote(1)
    bench.promote(2)
    bench.add(3)
    bench.add(4)
    return bench


def names(records: list[DraftRecord]) -> list[tuple[str, DraftStage, bool, bool]]:
    return [(r.version, r.stage, r.is_floor, r.is_pinned) for r in records]


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_change_is_made_or_not_wherever_the_process_dies(tmp_path: Path, change: str) -> None:
    filled(tmp_path / "filled")
    shutil.copytree(tmp_path / "filled", tmp_path / "after")
    after = Bench(tmp_path / "after", keep=5)
    before = names(after.registry.records())
    CHANGES[change](after)
    whole = names(after.registry.records())
    seen = set()
    for step in range(100):
        shutil.copytree(tmp_path / "filled", tmp_path / str(step))
        bench = Bench(tmp_path / str(step), keep=5)
        with pytest.MonkeyPatch.context() as patch:
            done = die_at(patch, step)
            try:
                CHANGES[change](bench)
                has_died = False
            except Died:
                has_died = True
        left = names(bench.reopen().records())
        check(bench.registry)
        assert leftovers(bench) == []
        if change == "add":
            # Also the point at which it is there and nothing has been pushed out yet.
            assert left in (before, whole) or set(whole) < set(left)
        elif change == "floor":
            # Taken first as any other, then made the floor; asking again completes it.
            bench.floor(9)
            left = names(bench.registry.records())
            assert set(left) >= set(whole)
        else:
            assert left in (before, whole)
        seen.add(tuple(left))
        if not has_died:
            break
    assert not has_died and len(done) > 4
    assert tuple(whole) in seen


def test_a_record_that_cannot_be_written_goes_along_with_the_next_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = filled(tmp_path)
    version = bench.registry.records()[0].version
    replace = os.replace

    def only_the_head(source: str, place: Path) -> None:
        if Path(place).name != "registry.json":
            raise OSError(28, "No space left on device")
        replace(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", only_the_head)
        bench.registry.decide(version, S.REFUSED, "no-gain")
        other = bench.registry.records()[1].version
        bench.registry.decide(other, S.REFUSED, "no-gain")
    left = bench.registry.records()
    assert bench.reopen().records() == left
    assert bench.registry.get(version).stage is bench.registry.get(other).stage is S.REFUSED


WRITER = """
import sys, time
from pathlib import Path
from paceline.domain.draft_records import DraftStage
from paceline.trainer.registry import Registry
from tests.unit.trainer.draft_files_made import TARGET, make_checkpoint

place = Path(sys.argv[1])
registry = Registry(place / "registry", model_digest=TARGET, time_s=time.time, keep=5)
registry.import_floor(make_checkpoint(place / "floor", 0))
print("ready", flush=True)
for number in range(int(sys.argv[2]), 10**9):
    source = make_checkpoint(place / "source", number)
    version = registry.add(
        source, drafter="model", parent="", num_samples=1, num_tokens=1
    ).version
    registry.decide(version, DraftStage.CANARY, "better")
    registry.decide(version, DraftStage.ACTIVE, "not-worse")
    if number % 3 == 0:
        registry.rollback("model")
"""


def test_a_registry_survives_being_killed(tmp_path: Path) -> None:
    moments = random.Random(5)
    newest = 0
    for round_ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(1 + 10_000 * round_)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(0.2 + 0.2 * moments.random())
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=10)
        child.stdout.close()
        registry = Registry(tmp_path / "registry", model_digest=TARGET, time_s=time.time, keep=5)
        check(registry)
        floor, active = registry.floor(), registry.active()
        assert floor is not None and active is not None
        assert registry.records()[0].number > newest
        newest = registry.records()[0].number
        assert len(registry.records()) <= 6
        # The directory is one process's at a time: hand it back before the next child.
        del registry


def test_a_registry_belongs_to_one_process(tmp_path: Path) -> None:
    Bench(tmp_path).floor()
    keeper = Bench(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path), "1"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert child.returncode != 0 and "another process uses" in child.stderr
    check(keeper.registry)
