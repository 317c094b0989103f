"""Carrying decisions to targets that fail in all ways."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.autoscaler.backoff import Backoff, BackoffRules
from paceline.autoscaler.ownership import Ownership
from paceline.autoscaler.problems import TARGET_REASONS
from paceline.autoscaler.steering import Effect, Steering
from paceline.autoscaler.targets.base import TargetError
from paceline.domain.member import Role
from tests.unit.autoscaler.made import decided, observed

P, D = Role.PREFILL, Role.DECODE
REFUSED = TargetError("no", reason="target-forbidden", is_retryable=False)
BUSY = TargetError("slow down", reason="target-throttled", retry_after_s=30.0)


class Pools:
    """A target in memory that can be told to fail or hang."""

    def __init__(self) -> None:
        self.sizes = {P: 1, D: 1}
        self.error: Exception | None = None
        self.hangs = False
        self.calls: list[tuple[Role, int, tuple[str, ...]]] = []

    async def read(self) -> Mapping[Role, int]:
        await self._trouble()
        return dict(self.sizes)

    async def apply(self, role: Role, replicas: int, victims: Sequence[str]) -> None:
        self.calls.append((role, replicas, tuple(victims)))
        await self._trouble()
        self.sizes[role] = replicas

    async def close(self) -> None:
        pass

    async def _trouble(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error


class Rig:
    def __init__(self, rule: str = "hold") -> None:
        self.target = Pools()
        self.failures: list[str] = []
        self.steering = Steering(
            self.target,
            Ownership(rule, 60.0),  # type: ignore[arg-type]
            Random(1),
            timeout_s=0.2,
            on_failure=self.failures.append,
            rules=BackoffRules(first_s=1.0, max_s=60.0),
        )

    async def apply(self, prefill: int, decode: int, at_s: float = 0.0) -> tuple[Effect, ...]:
        """Apply a decision about pools of one worker each."""
        return await self.steering.apply(observed(1, 1, at_s=at_s), decided(prefill, decode))


async def test_only_pools_that_differ_are_asked_for() -> None:
    rig = Rig()
    assert await rig.apply(1, 3) == (Effect(D, 3, "applied"),)
    assert rig.target.calls == [(D, 3, ())]
    assert await rig.steering.read(1.0) == ({P: 1, D: 3}, ())


async def test_both_pools_change_at_once() -> None:
    rig = Rig()
    effects = await rig.apply(0, 0)
    assert {effect.outcome for effect in effects} == {"applied"}
    assert rig.target.sizes == {P: 0, D: 0}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (REFUSED, "target-forbidden"),
        (BUSY, "target-throttled"),
        (RuntimeError("a bug"), "target-failed"),
        (TimeoutError(), "target-timeout"),
    ],
)
async def test_failures_are_effects_with_a_reason(error: Exception, reason: str) -> None:
    rig = Rig()
    rig.target.error = error
    (effect,) = await rig.apply(1, 2)
    assert effect.outcome == "failed" and effect.reason.startswith(f"{reason}: ")
    assert rig.failures == [reason]
    assert reason in TARGET_REASONS


async def test_a_target_that_hangs_costs_one_deadline() -> None:
    rig = Rig()
    rig.target.hangs = True
    effects = await rig.apply(2, 2)
    assert [effect.outcome for effect in effects] == ["failed", "failed"]
    _, problems = await rig.steering.read(0.0)
    assert problems == ("target-timeout: no answer within 0.2 s",)


async def test_a_refusal_is_not_repeated_before_its_time() -> None:
    rig = Rig()
    rig.target.error = BUSY
    await rig.apply(1, 2, at_s=0.0)
    (effect,) = await rig.apply(1, 2, at_s=29.9)
    assert effect.outcome == "waiting" and "target-throttled" in effect.reason
    assert len(rig.target.calls) == 1
    rig.target.error = None
    (effect,) = await rig.apply(1, 2, at_s=30.0)
    assert effect.outcome == "applied"


async def test_one_pools_trouble_is_not_the_others() -> None:
    rig = Rig()
    rig.target.error = REFUSED
    await rig.apply(2, 1, at_s=0.0)
    rig.target.error = None
    effects = await rig.apply(2, 2, at_s=1.0)
    assert [effect.outcome for effect in effects] == ["waiting", "applied"]


async def test_sizes_that_cannot_be_read_are_the_last_ones_with_a_problem() -> None:
    rig = Rig()
    await rig.apply(1, 4)
    rig.target.error = REFUSED
    sizes, problems = await rig.steering.read(0.0)
    assert (sizes, problems) == ({P: 0, D: 4}, ("target-forbidden: no",))
    # A refusal that does not pass by itself is not asked for in every period.
    rig.target.error = None
    assert await rig.steering.read(1.0) == ({P: 0, D: 4}, ("target-forbidden: no",))
    assert await rig.steering.read(61.0) == ({P: 1, D: 4}, ())


async def test_a_change_of_somebody_else_is_a_problem() -> None:
    rig = Rig()
    await rig.steering.read(0.0)
    rig.target.sizes[D] = 6
    sizes, problems = await rig.steering.read(1.0)
    assert sizes[D] == 6
    assert problems[0].startswith("target-changed: somebody else set decode from 1 to 6")


async def test_an_answer_that_got_lost_is_no_change_of_somebody_else() -> None:
    rig = Rig()
    await rig.steering.read(0.0)
    rig.target.error = TimeoutError()
    await rig.apply(1, 3)
    rig.target.error, rig.target.sizes[D] = None, 3
    assert await rig.steering.read(1.0) == ({P: 1, D: 3}, ())


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 120)), max_size=40),
    st.integers(0, 2**32),
)
def test_tries_get_rarer_and_never_come_before_they_are_welcome(
    failures: list[tuple[bool, float]], seed: int
) -> None:
    rules = BackoffRules(first_s=1.0, max_s=60.0)
    backoff, now_s = Backoff(rules, Random(seed)), 0.0
    for num, (is_retryable, retry_after_s) in enumerate(failures):
        assert backoff.wait_s(now_s) == 0
        backoff.note_failure(now_s, is_retryable=is_retryable, retry_after_s=retry_after_s)
        wait_s = backoff.wait_s(now_s)
        assert wait_s >= retry_after_s - 1e-6
        assert wait_s >= 0.5 * min(2.0**num, 60.0) - 1e-6
        assert wait_s <= max(60.0, retry_after_s) + 1e-6
        assert is_retryable or wait_s >= 30.0 - 1e-6
        now_s += wait_s
    backoff.note_success()
    assert backoff.wait_s(now_s) == 0
