"""The loop: what it does when everything around it fails, and how fast it wakes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.autoscaler.backoff import BackoffRules
from paceline.autoscaler.journal import Journal
from paceline.autoscaler.loop import LoopTimes, ScalingLoop
from paceline.autoscaler.ownership import Ownership
from paceline.autoscaler.report import Report
from paceline.autoscaler.steering import Steering
from paceline.autoscaler.targets.base import TargetError
from paceline.autoscaler.values import POOLS, Decision, Observation
from paceline.domain.member import Role
from paceline.process.metrics import Metrics
from tests.unit.autoscaler.made import Told, observed, pool, wanting
from tests.waiting import stays, until

P, D = Role.PREFILL, Role.DECODE


class World:
    """A platform in memory: sizes that a target holds, and everything that can go wrong."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.sizes = {P: 1, D: 1}
        self.history: list[tuple[Role, int]] = []
        self.num_calls = 0
        self.target_error: Exception | None = None
        self.apply_error: Exception | None = None
        self.source_error: Exception | None = None
        self.problems: tuple[str, ...] = ()
        self.parked = 0
        self.steering: Steering | None = None

    async def read(self, now_s: float | None = None) -> Mapping[Role, int]:
        """Be a target."""
        if self.target_error is not None:
            raise self.target_error
        return dict(self.sizes)

    async def apply(self, role: Role, replicas: int, victims: Sequence[str]) -> None:
        """Be a target."""
        self.num_calls += 1
        error = self.target_error or self.apply_error
        if error is not None:
            raise error
        self.sizes[role] = replicas
        self.history.append((role, replicas))

    async def close(self) -> None:
        """Be a target."""


class Source:
    """Sees the world."""

    def __init__(self, world: World, steering: Steering) -> None:
        self._world, self._steering = world, steering

    async def read(self, now_s: float) -> Observation:
        """Return what the target says, and the world's problems."""
        if self._world.source_error is not None:
            raise self._world.source_error
        sizes, problems = await self._steering.read(now_s)
        return observed(
            pool(sizes[P], self._world.sizes[P]),
            pool(sizes[D], self._world.sizes[D]),
            at_s=now_s,
            parked=self._world.parked,
            problems=(*self._world.problems, *problems),
        )


class Rig:
    """A loop over a world."""

    def __init__(
        self,
        decide: Callable[[Observation], Decision],
        period_s: float = 5.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.world = world = World()
        self.metrics = Metrics("autoscaler")
        report = Report(self.metrics)
        self.steering = Steering(
            world,
            Ownership("hold", 60.0),
            Random(1),
            1.0,
            report.note_target_failure,
            BackoffRules(1.0, 60.0),
        )
        self.journal = Journal(1000)
        self.loop = ScalingLoop(
            Source(world, self.steering),
            Told(decide),
            self.steering,
            self.journal,
            report,
            clock or (lambda: world.now_s),
            self._num_parked,
            LoopTimes(period_s, watch_s=0.02),
        )

    async def _num_parked(self) -> int:
        return self.world.parked

    async def step(self, seconds: float = 5.0) -> Decision:
        """Take a decision, some time after the last."""
        self.world.now_s += seconds
        return await self.loop.decide_once()

    def metric(self, name: str, /, **labels: str) -> float | None:
        """Return the value of a metric."""
        return self.metrics.registry.get_sample_value(f"paceline_autoscaler_{name}", labels)


async def test_a_decision_is_journaled_and_carried_out() -> None:
    rig = Rig(wanting({P: 2, D: 3}))
    decision = await rig.step()
    assert rig.world.sizes == {P: 2, D: 3}
    (entry,) = rig.journal.last(9)
    assert entry.decision == decision
    assert {effect.outcome for effect in entry.effects} == {"applied"}
    assert (await rig.step()).kind == "steady"
    assert rig.journal.last(1)[0].effects == ()


async def test_a_source_with_a_bug_means_hold(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(wanting({P: 2, D: 2}))
    await rig.step()
    rig.world.source_error = RuntimeError("boom")
    decision = await rig.step()
    assert (decision.kind, decision.replicas) == ("hold", {P: 1, D: 1})
    assert rig.journal.last(1)[0].observation.problems == ("source-failed: RuntimeError: boom",)
    assert rig.world.sizes == {P: 2, D: 2}
    assert rig.metric("source_failures_total", reason="source-failed") == 1
    rig.world.source_error = None
    assert (await rig.step()).kind == "steady"


async def test_a_policy_with_a_bug_means_hold() -> None:
    def fail(_: Observation) -> Decision:
        raise ZeroDivisionError("no traffic")

    rig = Rig(fail)
    decision = await rig.step()
    assert decision.kind == "hold"
    assert decision.reason == "the policy failed: ZeroDivisionError: no traffic"


async def test_holding_is_said_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rig = Rig(wanting({P: 1, D: 1}))
    await rig.step()
    rig.world.problems = ("prometheus-timeout: no answer within 2 s",)
    for _ in range(5):
        assert (await rig.step()).kind == "hold"
    assert rig.metric("holding") == 1
    assert rig.metric("source_failures_total", reason="prometheus-timeout") == 5
    rig.world.problems = ()
    await rig.step()
    assert rig.metric("holding") == 0
    events = [record.getMessage() for record in caplog.records]
    assert events.count("holding") == 1
    assert events.count("decision") == 1


async def test_the_last_change_has_one_series_only() -> None:
    wanted = {P: 1, D: 1}
    rig = Rig(wanting(wanted))
    for size in (2, 3, 2, 2, 2):
        wanted[D] = size
        await rig.step()
    rig.world.problems = ("prometheus-timeout: x",)
    await rig.step()
    families = {family.name: family for family in rig.metrics.registry.collect()}
    (sample,) = families["paceline_autoscaler_last_change_info"].samples
    assert sample.labels == {"kind": "hold", "reason": "told to hold"}
    assert rig.metric("decisions_total", kind="grow") == 2
    assert rig.metric("decisions_total", kind="shrink") == 1
    assert rig.metric("desired_replicas", pool="decode") == 2
    assert rig.metric("requested_replicas", pool="decode") == 2
    assert rig.metric("ready_replicas", pool="decode") == 2
    assert rig.metric("input", name="told_prefill") == 1.0


async def test_a_policy_cannot_make_more_series_than_there_may_be() -> None:
    def decide(observation: Observation) -> Decision:
        decision = wanting({P: 1, D: 1})(observation)
        inputs = {f"{'x' * 40}_{i}_{observation.at_s:.0f}": 1.0 for i in range(50)}
        return replace(decision, inputs={**inputs, "bad name!": 1.0, "good": 2.0})

    rig = Rig(decide)
    for _ in range(9):
        await rig.step()
    families = {family.name: family for family in rig.metrics.registry.collect()}
    names = {s.labels["name"] for s in families["paceline_autoscaler_input"].samples}
    assert "good" in names and "bad name!" not in names
    assert len(names) == 64


async def test_failures_of_the_target_are_counted_and_waited_out() -> None:
    rig = Rig(wanting({P: 1, D: 2}))
    await rig.step()
    rig.world.sizes[D] = 2
    rig.world.target_error = TargetError("no", reason="target-forbidden", is_retryable=False)
    for _ in range(100):
        decision = await rig.step()
        assert decision.kind == "hold"
    failures = rig.metric("target_failures_total", reason="target-forbidden")
    # 500 s, and a refusal that does not pass is asked for again after 30 to 60 s.
    assert failures is not None and 8 <= failures <= 18
    rig.world.target_error = None
    for _ in range(13):
        await rig.step()
    assert rig.metric("holding") == 0


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[None]:
    task = asyncio.create_task(rig.loop.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def wake(observation: Observation) -> Decision:
    """Start one of each for requests that are parked."""
    size = 1 if observation.parked else 0
    sizes = {role: max(size, observation.pools[role].requested) for role in POOLS}
    return Decision(observation.at_s, sizes, "told to wake", "wake" if size else "steady")


async def test_parked_requests_do_not_wait_for_the_period() -> None:
    loop = asyncio.get_running_loop()
    rig = Rig(wake, period_s=3600.0, clock=loop.time)
    rig.world.sizes = {P: 0, D: 0}
    async with running(rig):
        await until(lambda: len(rig.journal.last(9)) == 1)
        rig.world.parked = 2
        await until(lambda: rig.world.sizes == {P: 1, D: 1})
        # Once is enough: workers take their time to start.
        await stays(lambda: len(rig.journal.last(9)) == 2, 0.2)


async def test_parked_requests_wake_pools_while_prometheus_is_away() -> None:
    rig = Rig(wake)
    rig.world.sizes = {P: 0, D: 0}
    rig.world.problems = ("prometheus-unreachable: all queries: refused",)
    await rig.step()
    rig.world.parked = 1
    assert (await rig.step()).kind == "wake"
    assert rig.world.sizes == {P: 1, D: 1}


async def test_the_loop_goes_on_through_bugs_of_everybody() -> None:
    loop = asyncio.get_running_loop()
    rig = Rig(wanting({P: 2, D: 2}), period_s=0.02, clock=loop.time)
    assert rig.loop.is_stuck
    rig.world.source_error = RuntimeError("boom")
    async with running(rig):
        await until(lambda: len(rig.journal.last(99)) > 3)
        assert not rig.loop.is_stuck
        rig.world.source_error, rig.world.target_error = None, RuntimeError("bang")
        num = len(rig.journal.last(999))
        await until(lambda: len(rig.journal.last(999)) > num + 3)
        rig.world.target_error = None
        await until(lambda: rig.world.sizes == {P: 2, D: 2}, timeout_s=30)


FAULTS = st.lists(
    st.tuples(
        st.sampled_from(["none", "problem", "source", "target", "refused", "throttled", "other"]),
        st.floats(0.5, 30.0),
    ),
    max_size=120,
)


@settings(deadline=None, max_examples=60)
@given(faults=FAULTS, wanted=st.tuples(st.integers(0, 6), st.integers(0, 6)))
def test_random_failures_neither_end_the_loop_nor_make_it_flap(
    faults: list[tuple[str, float]], wanted: tuple[int, int]
) -> None:
    asyncio.run(live_through(faults, dict(zip(POOLS, wanted, strict=True))))


async def live_through(faults: list[tuple[str, float]], wanted: dict[Role, int]) -> None:
    """Go through failures, and hold the loop to what it promises."""
    rig = Rig(wanting(wanted))
    world = rig.world
    spent_s = 0.0
    for fault, seconds in faults:
        before, num_before = dict(world.sizes), len(world.history)
        world.problems = ("prometheus-missing: x",) if fault == "problem" else ()
        world.source_error = RuntimeError("boom") if fault == "source" else None
        world.target_error = TargetError("no", reason="target-error") if fault == "target" else None
        world.apply_error = {
            "refused": TargetError("no", reason="target-conflict"),
            "throttled": TargetError("no", reason="target-throttled", retry_after_s=20.0),
        }.get(fault)
        if fault == "other":
            world.sizes[D] = before[D] = 9
        spent_s += seconds
        decision = await rig.step(seconds)
        seen = rig.journal.last(1)[0].observation
        for role, size in world.history[num_before:]:
            assert fault in ("none", "other")
            assert not seen.problems
            assert size == decision.replicas[role] == wanted[role]
            assert before[role] != size
    # One change per pool, and one more for each time that somebody else set a size.
    num_others = sum(fault == "other" for fault, _ in faults)
    assert len(world.history) <= 2 + num_others
    # Refusals are asked for ever more rarely: at most one call per second and pool at first.
    assert world.num_calls <= 2 + num_others + 2 * (8 + spent_s / 30.0)


async def test_a_target_that_always_refuses_is_asked_ever_more_rarely() -> None:
    rig = Rig(wanting({P: 1, D: 5}))
    rig.world.apply_error = TargetError("no", reason="target-conflict")
    for _ in range(720):
        await rig.step(5.0)
    # In an hour: 1, 2, 4, ... 60 s, at least half of each.
    assert 60 <= rig.world.num_calls <= 130
