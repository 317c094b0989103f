"""Candidates on trial, over a real registry: what outcomes of live sequences do to versions."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from paceline.domain.draft_records import DraftStage
from paceline.domain.learnings import SequenceOutcome
from paceline.trainer.trials import paired
from paceline.v1 import learner_pb2
from tests.unit.trainer.rig import Rig, conducted
from tests.unit.trainer.small_drafts import make_draft
from tests.waiting import until


def outcomes(version: str, accepted: int, count: int, tried: int = 40) -> list[SequenceOutcome]:
    return [
        SequenceOutcome("model", version, b"t" * 8, "code", 20, tried, accepted, 20 + accepted)
        for _ in range(count)
    ]


async def forced(rig: Rig, tmp_path: Path, seed: int) -> str:
    draft = make_draft(tmp_path / f"draft-{seed}", seed)
    return (await rig.conductor.offer(draft, "model", True)).version


def stage_of(rig: Rig, version: str) -> DraftStage:
    return rig.registry.get(version).stage


async def test_a_bad_draft_forced_past_the_gate_is_back_within_twenty_sequences(
    tmp_path: Path,
) -> None:
    async with conducted(tmp_path) as rig:
        floor = rig.registry.floor()
        assert floor is not None
        bad = await forced(rig, tmp_path, 1)
        assert stage_of(rig, bad) is DraftStage.CANARY

        async def is_back() -> bool:
            # As if the workers' sequences were shared out evenly.
            rig.conductor.on_outcomes("decode-0", outcomes(floor.version, 30, 1))
            rig.conductor.on_outcomes("decode-0", outcomes(bad, 2, 1))
            await asyncio.sleep(0.02)
            return stage_of(rig, bad) is DraftStage.ROLLED_BACK

        num_asked = 0
        while not await is_back():
            num_asked += 1
            assert num_asked < 20
        active = rig.registry.active()
        assert active is not None and active.version == floor.version
        assert rig.registry.get(bad).decisions[-1].reason == "far-worse"
        labels = {"drafter": "model", "stage": "rolled-back", "reason": "far-worse"}

        async def is_counted() -> bool:
            return rig.value("paceline_draft_decisions_total", **labels) == 1

        await until(is_counted, 10)


async def test_a_better_draft_is_promoted_and_taken_back_when_it_turns_bad(
    tmp_path: Path,
) -> None:
    async with conducted(tmp_path) as rig:
        floor = rig.registry.floor()
        assert floor is not None
        good = await forced(rig, tmp_path, 1)

        async def after(version_accepts: int, stage: DraftStage) -> None:
            async def is_there() -> bool:
                rig.conductor.on_outcomes("decode-0", outcomes(floor.version, 20, 2))
                rig.conductor.on_outcomes("decode-0", outcomes(good, version_accepts, 2))
                await asyncio.sleep(0.01)
                return stage_of(rig, good) is stage

            await until(is_there, 20)

        await after(30, DraftStage.ACTIVE)
        assert rig.registry.get(good).decisions[-1].reason == "not-worse"
        await after(8, DraftStage.ROLLED_BACK)
        assert rig.registry.get(good).decisions[-1].reason.startswith("live-")
        active = rig.registry.active()
        assert active is not None and active.version == floor.version


async def test_outcomes_of_others_and_of_other_drafters_do_not_count(tmp_path: Path) -> None:
    async with conducted(tmp_path) as rig:
        version = await forced(rig, tmp_path, 1)
        stranger = [
            SequenceOutcome("model:code", version, b"", "", 1, 40, 0, 1) for _ in range(200)
        ]
        rig.conductor.on_outcomes("decode-0", stranger)
        rig.conductor.on_outcomes("decode-0", outcomes("0" * 12, 0, 200))
        await asyncio.sleep(0.3)
        assert stage_of(rig, version) is DraftStage.CANARY


async def test_an_offer_that_is_not_forced_waits_where_nothing_learns(tmp_path: Path) -> None:
    async with conducted(tmp_path) as rig:
        draft = make_draft(tmp_path / "draft", 1)
        record = await rig.conductor.offer(draft, "model", False)
        assert record.stage is DraftStage.CANDIDATE


@pytest.mark.parametrize(("temperature", "expected"), [(0.0, (7.0, 5.0)), (0.8, (6.5, 4.25))])
def test_the_gate_compares_what_verification_accepts(
    temperature: float, expected: tuple[float, float]
) -> None:
    sample = learner_pb2.JudgedSample(
        temperature=temperature,
        num_positions=10,
        candidate=learner_pb2.JudgedScore(num_agreed=7, overlap=6.5),
        incumbent=learner_pb2.JudgedScore(num_agreed=5, overlap=4.25),
    )
    empty = learner_pb2.JudgedSample(temperature=temperature)
    (scores,) = paired([learner_pb2.JudgedDomain(domain="code", samples=[sample, empty])])
    (score,) = scores.scores
    assert (scores.domain, score.num_positions) == ("code", 10)
    assert (score.candidate, score.incumbent) == expected
