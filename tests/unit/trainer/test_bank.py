"""A bank of drafters over a real registry: how members come into use, and go."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from paceline.domain.draft_records import DraftRecord, DraftStage
from paceline.domain.drafts import MAX_DRAFTERS
from paceline.domain.errors import ExhaustedError, NotFoundError, PreconditionError
from paceline.domain.learnings import SequenceOutcome
from paceline.trainer.registry import Registry
from tests.unit.trainer.rig import DIGEST, Rig, conducted, trainer_rig
from tests.unit.trainer.small_drafts import make_draft
from tests.waiting import until

CODE = "model:code"


async def forced(rig: Rig, tmp_path: Path, seed: int, drafter: str = CODE) -> DraftRecord:
    draft = make_draft(tmp_path / f"draft-{seed}", seed)
    return await rig.conductor.offer(draft, drafter, True)


def planned(rig: Rig) -> dict[str, str]:
    return {entry.drafter: entry.active.version for entry in rig.attendants.plan or ()}


def outcomes(version: str, accepted: int, count: int) -> list[SequenceOutcome]:
    return [
        SequenceOutcome(CODE, version, b"t" * 8, "code", 20, 40, accepted, 20 + accepted)
        for _ in range(count)
    ]


async def test_the_first_version_of_a_name_displaces_nothing(tmp_path: Path) -> None:
    async with conducted(tmp_path) as rig:
        floor = rig.registry.floor()
        assert floor is not None
        first = await forced(rig, tmp_path, 1)
        assert (first.stage, first.parent) == (DraftStage.ACTIVE, floor.version)
        assert planned(rig) == {"model": floor.version, CODE: first.version}
        assert [r.version for r in rig.registry.records(CODE)] == [first.version]
        with pytest.raises(PreconditionError, match="is active"):
            await rig.conductor.offer(tmp_path / "draft-1", CODE, True)


async def test_later_versions_go_on_trial_against_the_one_before(tmp_path: Path) -> None:
    async with conducted(tmp_path) as rig:
        first = await forced(rig, tmp_path, 1)
        second = await forced(rig, tmp_path, 2)
        assert (second.stage, second.parent) == (DraftStage.CANARY, first.version)

        async def is_settled() -> bool:
            rig.conductor.on_outcomes("decode-0", outcomes(first.version, 20, 2))
            rig.conductor.on_outcomes("decode-0", outcomes(second.version, 30, 2))
            await asyncio.sleep(0.01)
            return rig.registry.get(second.version).stage is DraftStage.ACTIVE

        await until(is_settled, 20)
        assert planned(rig)[CODE] == second.version
        back = rig.registry.rollback(CODE)
        assert back.version == first.version
        floor = rig.registry.floor()
        assert floor is not None and planned(rig)["model"] == floor.version


async def test_a_removed_member_is_in_no_plan_and_comes_back_when_asked_for(
    tmp_path: Path,
) -> None:
    async with conducted(tmp_path) as rig:
        first = await forced(rig, tmp_path, 1)
        await forced(rig, tmp_path, 2)
        removed = await rig.desk.change(lambda store: store.remove(CODE))
        assert (removed.version, removed.stage) == (first.version, DraftStage.ROLLED_BACK)
        assert removed.decisions[-1].reason == "removed"
        assert CODE not in planned(rig)
        assert {r.stage for r in rig.registry.records(CODE)} == {DraftStage.ROLLED_BACK}
        with pytest.raises(NotFoundError):
            rig.registry.remove(CODE)
        again = await rig.conductor.offer(tmp_path / "draft-1", CODE, True)
        assert again.stage is DraftStage.ACTIVE and planned(rig)[CODE] == first.version
        pinned = rig.registry.pin(CODE, first.version)
        with pytest.raises(PreconditionError, match="is pinned"):
            rig.registry.remove(pinned.drafter)
        with pytest.raises(PreconditionError, match="begins with"):
            rig.registry.remove("model")


@pytest.mark.parametrize("is_head_lost", [False, True])
async def test_a_removed_member_stays_away_after_a_restart(
    tmp_path: Path, is_head_lost: bool
) -> None:
    async with trainer_rig(tmp_path) as rig:
        await forced(rig, tmp_path, 1)
        later = await forced(rig, tmp_path, 2)
        rig.registry.decide(later.version, DraftStage.ACTIVE, "not-worse")
        await forced(rig, tmp_path, 3, "model:prose")
        rig.registry.remove(CODE)
    del rig
    if is_head_lost:
        (tmp_path / "registry" / "registry.json").unlink()
    registry = Registry(tmp_path / "registry", model_digest=DIGEST, time_s=lambda: 0.0)
    assert [entry.drafter for entry in registry.plan()] == ["model", "model:prose"]
    assert registry.active(CODE) is None


async def test_a_bank_has_no_more_names_than_engines_take(tmp_path: Path) -> None:
    async with trainer_rig(tmp_path) as rig:
        for i in range(MAX_DRAFTERS - 1):
            await forced(rig, tmp_path, i + 1, f"model:d{i}")
        num_before = len(rig.registry.records())
        with pytest.raises(ExhaustedError, match=r"model:d0, .*no room for model:code") as refused:
            await forced(rig, tmp_path, 99)
        assert refused.value.reason == "bank-full"
        assert len(rig.registry.records()) == num_before
        # Those that are there go on, the one that everybody may use among them.
        for number, drafter in ((50, "model:d0"), (51, "model")):
            assert (await forced(rig, tmp_path, number, drafter)).stage is DraftStage.CANARY
        rig.registry.remove("model:d3")
        assert (await rig.conductor.offer(tmp_path / "draft-99", CODE, True)).drafter == CODE
        assert len(planned(rig)) == MAX_DRAFTERS


async def test_an_offer_that_is_not_forced_waits_where_nothing_learns(tmp_path: Path) -> None:
    async with trainer_rig(tmp_path) as rig:
        record = await rig.conductor.offer(make_draft(tmp_path / "draft", 1), CODE, False)
        assert record.stage is DraftStage.CANDIDATE and CODE not in planned(rig)
