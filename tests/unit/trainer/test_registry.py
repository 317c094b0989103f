"""The draft registry: versions on disk, who stands where, and what is left when things go wrong."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.draft_records import DraftRecord, DraftScore, DraftStage
from paceline.domain.errors import (
    AlreadyExistsError,
    CorruptDraftError,
    ExhaustedError,
    InvalidRequestError,
    NotFoundError,
    PacelineError,
    PreconditionError,
)
from paceline.engine.checkpoint_files import model_digest
from paceline.rpc.record_codec import record_from_proto, record_to_proto
from paceline.trainer.record import record_from_json, record_to_json
from paceline.trainer.registry import Registry
from paceline.trainer.stages import TRANSITIONS
from tests.unit.trainer.draft_files_made import TARGET, make_checkpoint

S = DraftStage


class Bench:
    """A registry with a clock, and checkpoints to fill it with."""

    def __init__(self, place: Path, keep: int = 16, max_bytes: int = 1 << 30) -> None:
        self.place = place
        self.now_s = 1000.0
        self._limits = (keep, max_bytes)
        self.registry = self.reopen()

    def reopen(self) -> Registry:
        keep, max_bytes = self._limits
        self.registry = Registry(
            self.place / "registry",
            model_digest=TARGET,
            time_s=self._time_s,
            keep=keep,
            max_bytes=max_bytes,
        )
        return self.registry

    def add(self, number: int, parent: str = "", drafter: str = "model") -> DraftRecord:
        source = make_checkpoint(self.place / f"made-{number}", number)
        return self.registry.add(
            source, drafter=drafter, parent=parent, num_samples=number, num_tokens=10 * number
        )

    def floor(self, number: int = 0, drafter: str = "model") -> DraftRecord:
        source = make_checkpoint(self.place / f"made-{number}", number)
        return self.registry.import_floor(source, drafter)

    def promote(self, number: int) -> DraftRecord:
        record = self.add(number)
        self.registry.decide(record.version, S.CANARY, "better")
        return self.registry.decide(record.version, S.ACTIVE, "not-worse")

    def _time_s(self) -> float:
        self.now_s += 1
        return self.now_s


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def stages(registry: Registry) -> dict[int, DraftStage]:
    return {record.number: record.stage for record in registry.records()}


def check(registry: Registry) -> None:
    """What holds whatever happened."""
    records = registry.records()
    assert [r.number for r in records] == sorted((r.number for r in records), reverse=True)
    assert len({r.number for r in records}) == len(records)
    for drafter in {r.drafter for r in records}:
        own = registry.records(drafter)
        active, canary = registry.active(drafter), registry.canary(drafter)
        floor, previous = registry.floor(drafter), registry.previous(drafter)
        assert [r for r in own if r.stage is S.ACTIVE] == ([active] if active else [])
        assert [r for r in own if r.stage is S.CANARY] == ([canary] if canary else [])
        assert [r for r in own if r.is_floor] == ([floor] if floor else [])
        assert previous is None or previous != active
        assert floor is None or active is not None
        pinned = [r for r in own if r.is_pinned]
        assert pinned in ([], [active])
    for entry in registry.plan():
        for file in filter(None, (entry.active, entry.canary)):
            registry.verify(file.version)


def test_the_floor_is_active_until_something_better_is(bench: Bench) -> None:
    floor = bench.floor()
    assert floor.stage is S.ACTIVE and floor.is_floor
    assert floor == bench.floor() == bench.reopen().import_floor(bench.place / "made-0")
    assert [entry.active.version for entry in bench.registry.plan()] == [floor.version]
    first = bench.promote(1)
    assert bench.registry.active() == first
    assert bench.registry.previous() == bench.registry.floor() == bench.floor()
    assert bench.floor().stage is S.RETIRED and bench.floor().is_floor


def test_a_new_floor_replaces_the_old_one_but_not_what_was_trained(bench: Bench) -> None:
    bench.floor(0)
    second = bench.floor(1)
    assert bench.registry.active() == second
    trained = bench.promote(2)
    third = bench.floor(3)
    assert bench.registry.active() == trained
    assert [r.version for r in bench.registry.records() if r.is_floor] == [third.version]
    check(bench.registry)
    check(bench.reopen())


def test_a_candidate_is_a_copy_with_the_digest_of_its_bytes(bench: Bench) -> None:
    source = make_checkpoint(bench.place / "source", 3, num_shards=3)
    (source / "optimizer.pt").write_bytes(b"pickled")
    (source / "model-9.safetensors").write_bytes(b"named by no index")
    record = bench.registry.add(source, drafter="model", parent="abc", num_samples=5, num_tokens=50)
    assert record.digest == model_digest(source) and record.version == record.digest[:12]
    assert (record.stage, record.parent, record.num_samples) == (S.CANDIDATE, "abc", 5)
    files = bench.registry.files(record.version)
    assert [path.name for path in files] == [
        *("config.json", "model-0.safetensors", "model-1.safetensors", "model-2.safetensors"),
        *("tokenizer.json", "model.safetensors.index.json"),
    ]
    assert sum(path.stat().st_size for path in files) == record.num_bytes
    assert all(path.read_bytes() == (source / path.name).read_bytes() for path in files)
    assert bench.reopen().get(record.version) == record


@pytest.mark.parametrize("damage", ["missing", "garbage", "cut", "no-config", "outside", "pickle"])
def test_what_is_no_safetensors_checkpoint_is_refused(bench: Bench, damage: str) -> None:
    source = make_checkpoint(bench.place / "source", 1)
    weights = source / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "garbage":
        weights.write_bytes(b"\x80\x04" * 100)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "no-config":
        (source / "config.json").write_text("[")
    elif damage == "outside":
        index = source / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"w": "../made/model.safetensors"}}))
    else:
        weights.rename(source / "pytorch_model.bin")
    with pytest.raises(InvalidRequestError):
        bench.registry.add(source, drafter="model", parent="", num_samples=0, num_tokens=0)
    assert bench.registry.records() == [] and leftovers(bench) == []


def test_the_same_weights_are_the_same_version(bench: Bench) -> None:
    record = bench.add(1)
    bench.registry.decide(record.version, S.REFUSED, "no-gain")
    assert bench.add(1) == bench.registry.get(record.version)
    with pytest.raises(AlreadyExistsError):
        bench.add(1, drafter="model:code")


@pytest.mark.parametrize("stage", list(S))
@pytest.mark.parametrize("start", list(S))
def test_only_the_transitions_of_the_table_are_made(
    bench: Bench, start: DraftStage, stage: DraftStage
) -> None:
    bench.floor()
    version = bench.add(1).version
    path = {
        S.REFUSED: [S.REFUSED],
        S.CANARY: [S.CANARY],
        S.ACTIVE: [S.ACTIVE],
        S.RETIRED: [S.ACTIVE],
        S.ROLLED_BACK: [S.CANARY, S.ROLLED_BACK],
    }
    for step in path.get(start, []):
        bench.registry.decide(version, step, "a-reason")
    if start is S.RETIRED:
        bench.promote(2)
    before = bench.registry.records()
    if stage in TRANSITIONS[start]:
        after = bench.registry.decide(version, stage, "another-reason", "figures")
        assert after.stage is stage and after.decisions[-1].detail == "figures"
    else:
        with pytest.raises(PreconditionError):
            bench.registry.decide(version, stage, "another-reason")
        assert bench.registry.records() == before
    check(bench.registry)
    assert bench.registry.records() == bench.reopen().records()


def test_one_canary_at_a_time_and_its_trial_is_void_when_another_becomes_active(
    bench: Bench,
) -> None:
    bench.floor()
    first, second = bench.add(1), bench.add(2)
    bench.registry.decide(first.version, S.CANARY, "better")
    (entry,) = bench.registry.plan(canary_share=0.2)
    assert entry.canary is not None and entry.canary.version == first.version
    assert entry.canary_share == 0.2
    with pytest.raises(PreconditionError):
        bench.registry.decide(second.version, S.CANARY, "better")
    bench.registry.decide(second.version, S.ACTIVE, "forced")
    assert bench.registry.get(first.version).decisions[-1].reason == "trial-void"
    assert bench.registry.get(first.version).stage is S.CANDIDATE
    check(bench.registry)


def test_taking_the_active_back_goes_to_the_previous_then_to_the_floor(bench: Bench) -> None:
    floor, first, second = bench.floor(), bench.promote(1), bench.promote(2)
    bench.registry.decide(second.version, S.ROLLED_BACK, "live-worse", "0.2 < 0.4")
    active = bench.registry.active()
    assert active is not None and active.version == first.version
    assert active.decisions[-1].reason == "rolled-back-to"
    previous = bench.registry.previous()
    assert previous is not None and previous.version == floor.version
    assert bench.registry.rollback("model").version == floor.version
    with pytest.raises(PreconditionError, match="no version to go back to"):
        bench.registry.rollback("model")
    with pytest.raises(PreconditionError):
        bench.registry.decide(floor.version, S.ROLLED_BACK, "live-worse")
    assert bench.registry.rollback("model", second.version[:6]).version == second.version
    check(bench.reopen())


def test_going_back_skips_a_version_whose_bytes_changed(bench: Bench) -> None:
    floor, first, second = bench.floor(), bench.promote(1), bench.promote(2)
    damage(bench.registry.files(first.version))
    with pytest.raises(CorruptDraftError):
        bench.registry.verify(first.version)
    with pytest.raises(CorruptDraftError):
        bench.registry.rollback("model", first.version)
    assert bench.registry.active() == second
    assert bench.registry.rollback("model").version == floor.version


def test_what_was_never_in_use_is_not_gone_back_to(bench: Bench) -> None:
    bench.floor()
    record = bench.add(1)
    with pytest.raises(PreconditionError, match="never in use"):
        bench.registry.rollback("model", record.version)
    with pytest.raises(NotFoundError):
        bench.registry.rollback("model:code")


def test_a_pinned_version_stays_whatever_is_decided(bench: Bench) -> None:
    bench.floor()
    first, second = bench.add(1), bench.add(2)
    bench.registry.decide(second.version, S.CANARY, "better")
    assert bench.registry.pin("model", first.version[:8]).is_pinned
    for stage in (S.CANARY, S.ACTIVE):
        with pytest.raises(PreconditionError, match="pinned"):
            bench.registry.decide(second.version, stage, "better")
    with pytest.raises(PreconditionError, match="pinned"):
        bench.registry.decide(first.version, S.ROLLED_BACK, "live-worse")
    with pytest.raises(PreconditionError, match="pinned"):
        bench.registry.rollback("model")
    assert [entry.canary for entry in bench.registry.plan(control_share=0.1)] == [None]
    bench.reopen()
    check(bench.registry)
    assert bench.registry.pin("model", second.version).version == second.version
    check(bench.registry)
    assert not bench.registry.unpin("model").is_pinned
    assert bench.registry.unpin("model") == bench.registry.pin("model", "")
    assert bench.registry.rollback("model").version == first.version


def test_without_a_canary_the_previous_version_stays_as_control(bench: Bench) -> None:
    floor = bench.floor()
    assert bench.registry.plan(control_share=0.05)[0].canary is None
    bench.promote(1)
    (entry,) = bench.registry.plan(control_share=0.05)
    assert entry.canary is not None and entry.canary.version == floor.version
    assert bench.registry.plan()[0].canary is None


def test_versions_are_found_by_a_beginning(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep=32)
    found = [bench.add(number).version for number in range(1, 20)]
    for version in found:
        assert bench.registry.get(version[:10]).version == version
    first_digits = [version[0] for version in found]
    twice = next(digit for digit in first_digits if first_digits.count(digit) > 1)
    with pytest.raises(InvalidRequestError) as ambiguous:
        bench.registry.get(twice)
    assert ambiguous.value.reason == "draft-ambiguous"
    for unknown in ("", "zz", found[0] + "0"):
        with pytest.raises(NotFoundError) as missing:
            bench.registry.get(unknown)
        assert missing.value.reason == "draft-not-found"


def test_the_oldest_go_but_none_that_is_needed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep=5)
    floor, first = bench.floor(), bench.promote(1)
    pinned = bench.add(2)
    bench.registry.pin("model", pinned.version)
    for number in range(3, 12):
        newest = bench.add(number)
    left = {record.version for record in bench.registry.records()}
    assert len(left) == 5 and left > {floor.version, first.version, pinned.version, newest.version}
    assert {path.name for path in (tmp_path / "registry" / "versions").iterdir()} == left
    assert newest.number == 12
    check(bench.reopen())


def test_the_registry_keeps_to_its_bytes(tmp_path: Path) -> None:
    size = Bench(tmp_path / "size").add(1).num_bytes
    bench = Bench(tmp_path / "few", max_bytes=3 * size + 10)
    bench.floor()
    for number in range(1, 8):
        bench.add(number)
    assert [record.number for record in bench.registry.records()] == [8, 7, 1]
    huge = make_checkpoint(tmp_path / "huge", 99, size=10 * size)
    with pytest.raises(ExhaustedError):
        bench.registry.add(huge, drafter="model", parent="", num_samples=0, num_tokens=0)
    assert [record.number for record in bench.registry.records()] == [8, 7, 1]
    # Numbers are not given twice, also where the newest is gone.
    assert bench.reopen().records()[0].number == 8


def test_a_registry_of_another_target_is_refused(bench: Bench) -> None:
    bench.floor()
    with pytest.raises(PreconditionError, match="of the target tttt") as error:
        Registry(bench.place / "registry", model_digest="u" * 64, time_s=lambda: 0.0)
    assert error.value.reason == "registry-of-another-model"


def test_foreign_and_torn_files_are_skipped_and_named(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    floor, kept = bench.floor(), bench.promote(1)
    torn, cut, strange = bench.add(2), bench.add(3), bench.add(4)
    versions = bench.place / "registry" / "versions"
    (versions / torn.version / "record.json").write_text('{"format": 1, "mod')
    path = versions / cut.version / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    record = json.loads((versions / strange.version / "record.json").read_text())
    record["model_digest"] = "another"
    (versions / strange.version / "record.json").write_text(json.dumps(record))
    (versions / "README").write_text("not a draft")
    with caplog.at_level(logging.WARNING):
        bench.reopen()
    assert {r.version for r in bench.registry.records()} == {floor.version, kept.version}
    paths = [r.fields["path"] for r in caplog.records if r.message == "draft-skipped"]  # type: ignore[attr-defined]
    assert {Path(path).name for path in paths} == {
        *(torn.version, cut.version, strange.version),
        "README",
    }
    # The place of one that could not be read is taken again.
    assert bench.add(2).version == torn.version
    check(bench.reopen())


def test_a_lost_active_version_is_followed_by_the_previous_one(bench: Bench) -> None:
    bench.floor()
    first, second = bench.promote(1), bench.promote(2)
    (bench.place / "registry" / "versions" / second.version / "config.json").unlink()
    active = bench.reopen().active()
    assert active is not None and active.version == first.version
    check(bench.registry)


def test_a_lost_head_is_made_again_from_the_records(bench: Bench) -> None:
    bench.floor()
    bench.promote(1)
    bench.registry.pin("model", bench.promote(2).version)
    before = bench.registry.records()
    head = bench.place / "registry" / "registry.json"
    for content in (b"", b"\x00" * 50, b"[]", b'{"format": 1}'):
        head.write_bytes(content)
        assert bench.reopen().records() == before
        check(bench.registry)


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """No file may grow beyond 4 KiB: what a full disk does, at a place that can be chosen."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_state(bench: Bench, request: pytest.FixtureRequest) -> None:
    bench.floor()
    big = make_checkpoint(bench.place / "big", 5, size=5000)
    before = bench.registry.records()
    request.getfixturevalue("small_files_only")
    with pytest.raises(ExhaustedError) as error:
        bench.registry.add(big, drafter="model", parent="", num_samples=0, num_tokens=0)
    assert error.value.reason == "disk-full"
    assert bench.registry.records() == before and leftovers(bench) == []
    # A decision whose head does not fit is not made either.
    with pytest.raises(ExhaustedError):
        for number in range(1, 40):
            bench.registry.decide(bench.add(number).version, S.ACTIVE, "forced", "x" * 2000)
    check(bench.registry)
    after = bench.registry.records()
    assert leftovers(bench) == [] and bench.reopen().records() == after


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["add", "decide", "rollback", "back-to", "pin", "unpin", "floor", "open"]),
        st.integers(0, 7),
        st.sampled_from(list(S)),
    ),
    max_size=25,
)


@settings(max_examples=15, deadline=None)
@given(moves=MOVES)
def test_whatever_is_asked_the_registry_agrees_with_itself(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, int, DraftStage]]
) -> None:
    bench = Bench(tmp_path_factory.mktemp("moves"), keep=6)
    bench.floor(100)
    for move, number, stage in moves:
        known = bench.registry.records()
        version = known[number % len(known)].version
        before = bench.registry.records()
        try:
            if move == "add":
                bench.add(number)
            elif move == "decide":
                bench.registry.decide(version, stage, "a-reason")
            elif move == "rollback":
                bench.registry.rollback("model")
            elif move == "back-to":
                bench.registry.rollback("model", version)
            elif move == "pin":
                bench.registry.pin("model", version)
            elif move == "unpin":
                bench.registry.unpin("model")
            elif move == "floor":
                bench.floor(100 + number % 2)
            else:
                assert bench.reopen().records() == before
        except PacelineError:
            assert bench.registry.records() == before
        check(bench.registry)
    last = bench.registry.records()
    assert bench.reopen().records() == last


def test_records_survive_the_wire_and_json(bench: Bench) -> None:
    bench.floor()
    record = bench.add(1, parent="abc")
    scores = (DraftScore("", 100, 0.5, 0.25, 0.1, 0.4), DraftScore("de", 50, 0.5, 0.5, -0.1, 0.1))
    bench.registry.decide(record.version, S.CANARY, "better", "figures", scores)
    record = bench.registry.get(record.version)
    assert record.scores == scores
    assert record_from_proto(record_to_proto(record)) == record
    assert record_from_json(json.loads(json.dumps(record_to_json(record)))) == record
    ranked = replace(record, rank=8)
    assert record_from_proto(record_to_proto(ranked)) == ranked
    values = json.loads(json.dumps(record_to_json(ranked)))
    assert record_from_json(values) == ranked
    del values["rank"]
    assert record_from_json(values) == record, "written before there were ranks"
    unknown = record_to_proto(record)
    unknown.stage = 99  # type: ignore[assignment]
    with pytest.raises(ValueError, match="99"):
        record_from_proto(unknown)
    for name, value in (
        ("number", "1"),
        ("number", -1),
        ("stage", "lost"),
        ("digest", 5),
        ("rank", "8"),
    ):
        with pytest.raises((ValueError, TypeError)):
            record_from_json({**record_to_json(record), name: value})


def damage(files: list[Path]) -> None:
    """Change a byte of the weights."""
    path = next(path for path in files if path.name == "model.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def leftovers(bench: Bench) -> list[str]:
    found = bench.place.glob("registry/**/.*-*")
    return [path.name for path in found]
