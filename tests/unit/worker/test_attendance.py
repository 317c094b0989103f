"""A worker's side of the link against real trainers: plans are followed, troubles survived."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from paceline.cli.ports import free_port
from paceline.domain.cost import StepCost, StepShape
from paceline.domain.draft_records import DraftStage
from paceline.domain.drafts import DraftState, HeldDraft, StagedDraft
from paceline.domain.learnings import SequenceOutcome
from paceline.domain.member import Load
from paceline.domain.slack import Slack
from paceline.process.lifecycle import Tasks
from paceline.process.metrics import Metrics
from paceline.worker.attendance import Attendance, Identity, SlackMeter
from paceline.worker.draft_files import DraftCache
from paceline.worker.drafts import DraftFollower
from paceline.worker.outbox import Outbox
from tests.unit.trainer.rig import DIGEST, Rig, trainer_rig
from tests.unit.trainer.small_drafts import make_draft
from tests.waiting import until


@dataclass
class Worker:
    """What a worker has besides its engine, which here only notes what it is to draft with."""

    cache: Path
    metrics: Metrics
    outbox: Outbox
    attendance: Attendance
    changes: list[tuple[StagedDraft, ...]]
    trainers: list[str] = field(default_factory=list)

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    @property
    def versions(self) -> dict[str, float]:
        return {staged.version: round(staged.share, 6) for staged in self.changes[-1]}


@asynccontextmanager
async def worker(
    directory: Path, name: str = "decode-0", local: Sequence[StagedDraft] = ()
) -> AsyncIterator[Worker]:
    metrics, draw = Metrics("worker"), random.Random(0)
    changes: list[tuple[StagedDraft, ...]] = []
    attendance: Attendance

    def change(drafts: tuple[StagedDraft, ...]) -> None:
        changes.append(drafts)
        held = tuple(HeldDraft(staged.drafter, staged.version) for staged in drafts)
        attendance.note_state(DraftState(held, len(changes), 0.001 * len(changes)))

    cache = directory / f"cache-{name}"
    follower = DraftFollower(DraftCache(cache, 1 << 20), change, metrics, local=local, random=draw)
    outbox = Outbox(time.monotonic, metrics.draft_outcomes_dropped.inc)
    made = Worker(cache, metrics, outbox, None, changes)  # type: ignore[arg-type]

    async def find() -> Sequence[str]:
        return list(made.trainers)

    identity = Identity(name, DIGEST, "here")
    attendance = made.attendance = Attendance(identity, find, outbox, follower, metrics, draw)
    tasks = Tasks()
    running = tasks.spawn(attendance.run(tasks), "attendance")
    try:
        yield made
    finally:
        assert not running.done()
        await tasks.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with trainer_rig(tmp_path) as running:
        yield running


async def force(rig: Rig, tmp_path: Path, seed: int) -> str:
    directory = make_draft(tmp_path / f"draft-{seed}", seed)
    version = (await rig.conductor.offer(directory, "model", False)).version
    await rig.desk.change(lambda store: store.decide(version, DraftStage.ACTIVE, "test"))
    return version


def floor_of(rig: Rig) -> str:
    floor = rig.registry.floor()
    assert floor is not None
    return floor.version


async def test_two_workers_follow_offers_trials_and_rollbacks(rig: Rig, tmp_path: Path) -> None:
    async with worker(tmp_path, "decode-0") as one, worker(tmp_path, "decode-1") as two:
        one.trainers = two.trainers = [rig.address]
        for each in (one, two):
            await until(lambda each=each: each.changes and each.versions == {floor_of(rig): 1.0})
        forced = await force(rig, tmp_path, 1)
        for each in (one, two):
            await until(lambda each=each: each.versions == {forced: 1.0})
            (staged,) = each.changes[-1]
            for path in rig.registry.files(forced):
                assert (Path(staged.directory) / path.name).read_bytes() == path.read_bytes()
        candidate = make_draft(tmp_path / "candidate", 2)
        trial = (await rig.conductor.offer(candidate, "model", False)).version
        await rig.desk.change(lambda store: store.decide(trial, DraftStage.CANARY, "gate"))
        for each in (one, two):
            await until(lambda each=each: set(each.versions) == {forced, trial})
            assert sum(each.versions.values()) == 1.0
        await rig.desk.change(lambda store: store.decide(trial, DraftStage.ROLLED_BACK, "live"))
        for each in (one, two):
            await until(lambda each=each: each.versions == {forced: 1.0})
        await rig.desk.change(lambda store: store.rollback("model", ""))
        for each in (one, two):
            await until(lambda each=each: each.versions == {floor_of(rig): 1.0})
            assert each.value("paceline_draft_fetches_total") == 3
            num_bytes = sum(r.num_bytes for r in rig.registry.records())
            assert each.value("paceline_draft_fetched_bytes_total") == num_bytes
        await until(
            lambda: all(
                attendant.state.held == (HeldDraft("model", floor_of(rig)),)
                for attendant in rig.attendants.present()
            )
        )
        assert one.value("paceline_draft_swaps_total") == len(one.changes)


async def test_what_the_worker_began_with_is_not_fetched(rig: Rig, tmp_path: Path) -> None:
    local = (StagedDraft("model", floor_of(rig), str(tmp_path / "floor"), 1.0),)
    async with worker(tmp_path, local=local) as one:
        one.trainers = [rig.address]
        await until(lambda: one.value("paceline_trainer_link_up") == 1)
        await asyncio.sleep(0.2)
        assert one.changes == []
        forced = await force(rig, tmp_path, 1)
        await until(lambda: one.changes and one.versions == {forced: 1.0})
        await rig.desk.change(lambda store: store.rollback("model", ""))
        await until(lambda: one.changes[-1] == local)
        assert one.value("paceline_draft_fetches_total") == 1


async def test_wrong_bytes_are_refused_told_and_tried_again(rig: Rig, tmp_path: Path) -> None:
    async with worker(tmp_path) as one:
        one.trainers = [rig.address]
        await until(lambda: one.changes and one.versions == {floor_of(rig): 1.0})
        draft = make_draft(tmp_path / "draft", 1)
        version = (await rig.conductor.offer(draft, "model", False)).version
        weights = next(p for p in rig.registry.files(version) if p.name == "model.safetensors")
        good = weights.read_bytes()
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        await rig.desk.change(lambda store: store.decide(version, DraftStage.ACTIVE, "forced"))

        def told() -> str:
            (attendant,) = rig.attendants.present()
            return attendant.state.error

        await until(lambda: told() == f"{version}: wrong-digest")
        failures = "paceline_draft_fetch_failures_total"
        assert one.value(failures, reason="wrong-digest") >= 1
        assert one.versions == {floor_of(rig): 1.0}
        await until(lambda: {p.name for p in one.cache.iterdir()} == {floor_of(rig)})

        weights.write_bytes(good)
        await until(lambda: one.versions == {version: 1.0})
        await until(lambda: told() == "")


async def test_the_trainer_may_die_and_come_back(tmp_path: Path) -> None:
    port = free_port()
    outcomes = [SequenceOutcome("model", "v", b"", "", i, 0, 0, 0) for i in range(3)]
    async with worker(tmp_path) as one:
        one.trainers = [f"127.0.0.1:{port}"]
        await asyncio.sleep(0.3)
        assert one.changes == [] and one.value("paceline_trainer_link_up") == 0
        async with trainer_rig(tmp_path, port) as rig:
            await until(lambda: one.changes and one.versions == {floor_of(rig): 1.0})
        await until(lambda: one.value("paceline_trainer_link_up") == 0)
        assert one.versions == {floor_of(rig): 1.0}
        one.outbox.put_slack(Slack(num_running=2))
        one.outbox.put_outcomes(outcomes)
        heard: list[SequenceOutcome] = []
        async with trainer_rig(tmp_path, port) as rig:
            rig.attendants.on_outcomes = lambda id_, done: heard.extend(done)
            await until(lambda: len(rig.attendants) == 1)
            await until(lambda: heard)
            (attendant,) = rig.attendants.present()
            assert attendant.slack.num_running == 2
            assert attendant.state.held == (HeldDraft("model", floor_of(rig)),)
            forced = await force(rig, tmp_path, 1)
            await until(lambda: one.versions == {forced: 1.0})
        assert heard == outcomes


async def test_a_trainer_of_another_model_is_passed_over(rig: Rig, tmp_path: Path) -> None:
    async with trainer_rig(tmp_path / "other", digest="cd" * 32) as other, worker(tmp_path) as one:
        one.trainers = [other.address, rig.address]
        await until(lambda: one.changes and one.versions == {floor_of(rig): 1.0})


async def test_a_burst_reaches_the_trainer_within_milliseconds(rig: Rig, tmp_path: Path) -> None:
    heard_s: dict[int, float] = {}
    rig.attendants.on_slack = lambda id_, machine, slack: heard_s.setdefault(
        slack.num_running, time.perf_counter()
    )
    async with worker(tmp_path) as one:
        one.trainers = [rig.address]
        await until(lambda: one.value("paceline_trainer_link_up") == 1)
        delays_s = []
        for burst in range(1, 12):
            one.outbox.put_slack(Slack())
            await asyncio.sleep(0.02)
            began_s = time.perf_counter()
            one.outbox.put_slack(Slack(num_running=burst))
            await until(lambda burst=burst: burst in heard_s)
            delays_s.append(heard_s[burst] - began_s)
    # Other work on the machine may hold up some; waiting for the pace would hold up all.
    assert statistics.quantiles(delays_s, n=4)[0] < 0.02


def test_slack_is_what_the_step_cost_predicts() -> None:
    cost = StepCost(0.001, 0.0002, 0.0001, 1e-6)
    meter = SlackMeter(cost, threads=2, chunk_tokens=64, itl_target_s=0.05)
    assert meter.slack(Load(), 0, 0.1) == Slack(threads=2, last_step_s=0.1, itl_target_s=0.05)
    assert meter.slack(Load(), 3, 0.0).num_waiting == 3
    assert meter.slack(Load(), 3, 0.0).is_busy
    running = Load(num_running=4, num_waiting=1, context_tokens=900, pending_prefill_tokens=500)
    slack = meter.slack(running, 7, 0.02)
    shape = StepShape(rows=4, attended=900).with_chunk(64, 0)
    assert slack == Slack(4, 1, 2, cost.step_s(shape), 0.02, 0.05)
