"""Drafts for single domains from samples to a place in the bank, over a real learner."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from paceline.domain.draft_records import DraftStage
from paceline.domain.errors import InternalError, UnavailableError
from paceline.domain.learnings import SequenceOutcome
from paceline.process.metrics import Metrics
from paceline.process.sample_stream import SampleStream
from paceline.rpc.draft_codec import sample_to_proto
from paceline.trainer.attendants import Attendants
from paceline.trainer.bank import Bank
from paceline.trainer.desk import Desk
from paceline.trainer.idle_cores import IdleCores
from paceline.trainer.learner_link import LearnerLink
from paceline.trainer.learner_options import LearnerOptions
from paceline.trainer.registry import Registry
from paceline.trainer.spare import POLICIES, SpareRules
from paceline.trainer.specialising import Specialising
from paceline.trainer.specialists import SpecialistRules
from paceline.trainer.training import Spare, Training
from tests.unit.trainer.rig import DIGEST
from tests.unit.trainer.traffic import samples_of, small_draft
from tests.waiting import until

RULES = SpecialistRules(max_specialists=1, num_steps=60, min_samples=100)


@dataclass
class Rig:
    """A bank over a learner that has samples of two domains."""

    registry: Registry
    attendants: Attendants
    link: LearnerLink
    bank: Bank
    specialising: Specialising
    floor: str

    @property
    def plan(self) -> dict[str, str]:
        return {e.drafter: e.active.version for e in self.attendants.plan or ()}


def outcomes(domain: str, accepted: int, count: int = 100) -> list[SequenceOutcome]:
    """A hundred drafted positions per sequence, so many of them accepted."""
    return [SequenceOutcome("model", "v", b"t", domain, 25, 100, accepted, 0)] * count


@asynccontextmanager
async def rigged(target: Path, tmp_path: Path) -> AsyncIterator[Rig]:
    torch.manual_seed(0)
    draft = small_draft(target, tmp_path / "floor")
    metrics = Metrics("trainer")
    registry = Registry(tmp_path / "registry", model_digest=DIGEST, time_s=lambda: 0.0)
    attendants = Attendants(metrics)
    desk = Desk(registry, attendants)
    floor = await desk.change(lambda store: store.import_floor(draft))
    options = LearnerOptions(
        str(draft), learning_rate=2e-2, batch_tokens=256, micro_tokens=256, held_out_every=2
    )
    cores = os.sched_getaffinity(0)
    spare = Spare(POLICIES["leftover-cores"](SpareRules()), len(cores), IdleCores(cores))
    # Samples are fed by hand.
    stream = SampleStream("redis://127.0.0.1:1", "fleet", DIGEST)
    training = Training(options, stream, spare, metrics, get_draft=lambda: str(draft))
    link = training._learner = LearnerLink()
    run: asyncio.Task[None] | None = None
    try:
        await link.start(options)
        run = asyncio.create_task(link.run())
        for domain, seed in (("code", 0), ("prose", 9)):
            found = samples_of(target, 160, num_captured=64, domain=domain, seed=seed)
            link.feed([("1-0", sample_to_proto(s).SerializeToString()) for s in found])
        link.grant(threads=1, seconds=600.0)
        candidates = tmp_path / "candidates"
        bank = Bank(desk, training, candidates, metrics)
        specialising = Specialising(desk, training, bank, candidates, RULES)
        await until(lambda: link.progress.num_samples == 320, 60.0)
        yield Rig(registry, attendants, link, bank, specialising, floor.version)
    finally:
        await link.close()
        if run is not None:
            with suppress(UnavailableError):
                await run
        await stream.close()
        await desk.close()


async def test_a_domain_gets_its_own_draft_keeps_it_and_loses_it(
    target: Path, tmp_path: Path
) -> None:
    async with rigged(target, tmp_path) as rig:
        rig.specialising.note([*outcomes("code", 50), *outcomes("prose", 52)])
        await rig.specialising.look()
        assert rig.plan == {"model": rig.floor}, "nobody lies clearly below"

        rig.specialising.note(outcomes("prose", 80, 400))
        await rig.specialising.look()
        made = rig.registry.active("model:code")
        assert made is not None, rig.registry.records()
        assert (made.parent, made.rank, made.decisions[-1].reason) == (rig.floor, 8, "better")
        assert made.num_samples > 50 and made.num_tokens >= 60 * 256
        everything, code = made.scores
        assert (everything.domain, code.domain) == ("", "code")
        assert code.acceptance > code.incumbent_acceptance + 0.1
        assert rig.plan == {"model": rig.floor, "model:code": made.version}
        assert not (tmp_path / "candidates" / "specialist").exists()

        num_versions = len(rig.registry.records())
        await rig.specialising.look()
        assert len(rig.registry.records()) == num_versions, "its samples have not doubled"

        # What is offered under a name is judged on that domain's text alone, against what it has.
        again = small_draft(target, tmp_path / "untrained")
        refused = await rig.bank.offer(again, "model:code", False)
        assert refused.stage is DraftStage.REFUSED and refused.parent == made.version
        assert [score.domain for score in refused.scores] == ["", "code"]
        await rig.link.export(str(tmp_path / "learned"))
        taken = await rig.bank.offer(tmp_path / "learned", "model:prose", False)
        assert (taken.stage, taken.decisions[-1].reason) == (DraftStage.ACTIVE, "better")
        assert taken.scores[1].domain == "prose" and taken.rank == 0
        unheard = await rig.bank.offer(
            small_draft(target, tmp_path / "third", hidden=16), "model:unheard", False
        )
        assert unheard.decisions[-1].reason == "undecided"

        rig.specialising.note(outcomes("code", 95, 2_000))
        await rig.specialising.look()
        assert rig.plan == {"model": rig.floor, "model:prose": taken.version}
        assert rig.registry.get(made.version).decisions[-1].reason == "removed"


async def test_an_order_that_cannot_be_carried_out_says_why(target: Path, tmp_path: Path) -> None:
    async with rigged(target, tmp_path) as rig:
        for base, rank, why in ((tmp_path / "none", 8, "config"), (tmp_path / "floor", 0, "rank")):
            with pytest.raises(InternalError, match=why):
                await rig.link.specialise(
                    str(base), "code", str(tmp_path / "out"), rank=rank, num_steps=1
                )
        # A domain without samples waits; another order ends the wait.
        floor, out = str(tmp_path / "floor"), str(tmp_path / "out")
        waiting = asyncio.create_task(
            rig.link.specialise(floor, "unheard", out, rank=2, num_steps=1)
        )
        await asyncio.sleep(0.1)
        made = await rig.link.specialise(floor, "prose", out, rank=2, num_steps=1)
        assert made.num_samples > 50 and (tmp_path / "out" / "model.safetensors").is_file()
        with pytest.raises(InternalError, match="another draft was asked for"):
            await waiting
