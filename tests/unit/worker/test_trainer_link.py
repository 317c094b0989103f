"""Real workers attend at a trainer: how soon it hears of work, and of their end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from paceline.domain.drafts import HeldDraft
from paceline.domain.member import Member, Role
from paceline.domain.slack import Slack
from paceline.engine.checkpoint_files import model_digest
from paceline.process.membership import Membership
from tests.redis_server import RedisServer
from tests.unit.kvstore.node_process import FLEET
from tests.unit.trainer.rig import Rig, trainer_rig
from tests.unit.worker.conftest import WorkerMaker
from tests.unit.worker.worker_process import MODEL, calling, make_prompt, make_spec, metric
from tests.waiting import until


@pytest.fixture
async def rig(redis: RedisServer, tmp_path: Path) -> AsyncIterator[Rig]:
    """Run a trainer's door of the demo model that workers of the fleet find."""
    membership = Membership(redis.url, FLEET, lease_s=60)
    digest, floor = model_digest(MODEL), MODEL / "draft"
    async with trainer_rig(tmp_path, digest=digest, floor=floor) as running:
        member = Member("trainer-0", Role.TRAINER, running.address, os.getpid(), "test")
        member = await membership.register(member)
        try:
            yield running
        finally:
            await membership.deregister(member)
            await membership.close()


async def test_work_is_heard_of_before_its_first_step_ends_and_so_is_its_end(
    rig: Rig, make_worker: WorkerMaker
) -> None:
    heard: list[tuple[float, str, Slack]] = []
    left: list[str] = []
    rig.attendants.on_slack = lambda id_, machine, slack: heard.append(
        (time.monotonic(), id_, slack)
    )
    rig.attendants.on_leave = left.append
    flags = ("--itl-target-s", "0.05")
    decode = make_worker("attends", *flags, role="decode")
    member = await decode.start()
    floor = rig.registry.floor()
    assert floor is not None and member.draft_version == floor.version
    await until(lambda: len(rig.attendants) == 1)
    (attendant,) = rig.attendants.present()
    assert attendant.worker_id == "attends" and attendant.machine
    assert attendant.state.held == (HeldDraft("model", floor.version),)
    assert attendant.slack == Slack(threads=1, itl_target_s=0.05)

    async with calling(member) as caller:
        await caller.decode(make_spec(make_prompt(20, 0), max_tokens=2))
        for burst in range(4):
            await until(lambda: not rig.attendants.present()[0].slack.is_busy)
            heard.clear()
            began_s = time.monotonic()
            answer = await caller.decode(make_spec(make_prompt(400, burst + 1), max_tokens=40))
            ended_s = time.monotonic()
            assert len(answer.tokens) == 40
            first_s, _, first = heard[0]
            # Told when the request came, not when the engine was through with its first step.
            assert first.is_busy and first.num_running == 0 and first.num_waiting == 1
            assert first_s - began_s < 0.5 * (ended_s - began_s)
            assert any(s.num_running and s.predicted_step_s > 0 for _, _, s in heard)
            await until(lambda: not rig.attendants.present()[0].slack.is_busy)
    assert metric(member, "paceline_trainer_link_up") == 1
    assert left == []
    decode.kill()
    await until(lambda: left == ["attends"])


async def test_prefill_workers_tell_their_slack_and_follow_no_plan(
    rig: Rig, make_worker: WorkerMaker
) -> None:
    worker = make_worker("prefills", role="prefill")
    member = await worker.start()
    await until(lambda: len(rig.attendants) == 1)
    busy: list[Slack] = []
    rig.attendants.on_slack = lambda id_, machine, slack: busy.append(slack)
    async with calling(member) as caller:
        await caller.prefill(make_spec(make_prompt(300, 9)))
    await until(lambda: any(slack.is_busy for slack in busy))
    await until(lambda: not busy[-1].is_busy)
    await asyncio.sleep(0.1)
    (attendant,) = rig.attendants.present()
    assert attendant.state.held == () and attendant.state.error == ""
    assert await worker.stop() == 0
    await until(lambda: len(rig.attendants) == 0)
