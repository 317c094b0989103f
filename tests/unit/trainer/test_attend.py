"""Workers attend at a real server: who is let in, what they hear, who hears of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from paceline.domain.draft_records import DraftStage
from paceline.domain.drafts import DraftState, HeldDraft
from paceline.domain.learnings import SequenceOutcome
from paceline.domain.slack import Slack
from paceline.rpc.channel import map_rpc_error
from paceline.rpc.draft_codec import outcome_to_proto, slack_to_proto, state_to_proto
from tests.unit.trainer.rig import DIGEST, Rig, attending, trainer_rig
from tests.unit.trainer.small_drafts import make_draft
from tests.waiting import until

BUSY = Slack(num_running=3, threads=2, predicted_step_s=0.01)
OUTCOME = SequenceOutcome("model", "aaaa", b"tenant", "code", 10, 30, 20, 30)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with trainer_rig(tmp_path) as running:
        yield running


async def offered(rig: Rig, tmp_path: Path, seed: int, *, is_forced: bool = True) -> str:
    directory = make_draft(tmp_path / f"draft-{seed}", seed)
    record = await rig.conductor.offer(directory, "model", is_forced)
    return record.version


async def test_a_plan_comes_at_once_and_with_every_change(rig: Rig, tmp_path: Path) -> None:
    floor = rig.registry.floor()
    assert floor is not None
    async with attending(rig.stub) as one, attending(rig.stub) as two:
        await one.begin("decode-0")
        await two.begin("decode-1")
        plan = await one.hear()
        assert plan == await two.hear()
        assert [entry.active.version for entry in plan] == [floor.version]
        assert plan[0].active.digest == floor.digest

        candidate = await offered(rig, tmp_path, 1, is_forced=False)
        await rig.desk.change(lambda store: store.decide(candidate, DraftStage.CANARY, "gate"))
        trial = await one.hear_change(plan)
        assert trial == await two.hear_change(plan)
        assert trial[0].canary is not None and trial[0].canary.version == candidate
        assert 0 < trial[0].canary_share < 1

        await rig.desk.change(lambda store: store.decide(candidate, DraftStage.ACTIVE, "canary"))
        accepted = await one.hear_change(trial)
        assert accepted[0].active.version == candidate
        await rig.desk.change(lambda store: store.rollback("model", ""))
        assert (await one.hear_change(accepted))[0].active.version == floor.version
    assert rig.value("paceline_trainer_plan_number") == rig.attendants.number > 3


async def test_a_worker_that_does_not_read_misses_what_was_between(rig: Rig) -> None:
    async with attending(rig.stub) as worker:
        await worker.begin()
        last = await worker.hear()
        num_plans = 4000
        for i in range(num_plans):
            # Long names, so that few plans fit between the two sides.
            entry = replace(last[0], drafter="model:" + "x" * 2000 + str(i))
            rig.attendants.publish((entry,))
            await asyncio.sleep(0)
            if i % 100 == 0:
                await asyncio.sleep(0.001)
        num_heard = 0
        while last[0].drafter != entry.drafter:
            last = await worker.hear()
            num_heard += 1
        assert num_heard < num_plans / 4


async def test_what_workers_say_is_heard(rig: Rig) -> None:
    heard: list[object] = []
    rig.attendants.on_slack = lambda id_, machine, slack: heard.append((id_, machine, slack))
    rig.attendants.on_outcomes = lambda id_, outcomes: heard.append((id_, tuple(outcomes)))
    rig.attendants.on_leave = heard.append
    state = DraftState((HeldDraft("model", "aaaa"),), 3, 0.002, "")
    async with attending(rig.stub) as worker:
        await worker.begin(slack=slack_to_proto(BUSY))
        await worker.say(outcomes=[outcome_to_proto(OUTCOME)] * 2, state=state_to_proto(state))
        await until(lambda: len(heard) == 2)
        (attendant,) = rig.attendants.present()
        assert (attendant.slack, attendant.state) == (BUSY, state)
        assert rig.value("paceline_trainer_workers") == 1
    await until(lambda: len(heard) == 3)
    assert heard == [
        ("decode-0", "here", BUSY),
        ("decode-0", (OUTCOME, OUTCOME)),
        "decode-0",
    ]
    assert rig.value("paceline_trainer_workers") == 0


async def test_a_newer_call_of_a_worker_replaces_the_older(rig: Rig) -> None:
    left: list[str] = []
    rig.attendants.on_leave = left.append
    async with attending(rig.stub) as new:
        async with attending(rig.stub) as old:
            await old.begin()
            await old.hear()
            await new.begin(slack=slack_to_proto(BUSY))
            await new.hear()
            await old.say(slack=slack_to_proto(Slack()))
        await asyncio.sleep(0.1)
        (attendant,) = rig.attendants.present()
        assert attendant.slack == BUSY
        assert left == []
    await until(lambda: left == ["decode-0"])


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"model_digest": "cd" * 32}, grpc.StatusCode.FAILED_PRECONDITION, "other-model"),
        ({"worker_id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "invalid-argument"),
        ({"machine": "\n"}, grpc.StatusCode.INVALID_ARGUMENT, "invalid-argument"),
    ],
)
async def test_who_does_not_belong_here_is_refused_with_a_reason(
    rig: Rig, fields: dict[str, str], code: grpc.StatusCode, reason: str
) -> None:
    known = {"worker_id": "decode-0", "model_digest": DIGEST, "machine": "here"}
    async with attending(rig.stub) as worker:
        await worker.say(**{**known, **fields})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.hear()
    assert caught.value.code() is code
    assert map_rpc_error(caught.value).reason == reason
    assert len(rig.attendants) == 0


async def test_calls_end_with_the_trainer(tmp_path: Path) -> None:
    async with trainer_rig(tmp_path) as rig, attending(rig.stub) as worker:
        await worker.begin()
        await worker.hear()
        rig.attendants.close()
        async with asyncio.timeout(2):
            assert await worker.call.read() is grpc.aio.EOF
