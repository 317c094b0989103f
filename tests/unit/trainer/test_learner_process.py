"""The learner in its own process, as the trainer's event loop sees it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from paceline.domain.errors import (
    DeadlineError,
    ExhaustedError,
    InternalError,
    UnavailableError,
)
from paceline.engine.spec.drafters.medusa import load_medusa_heads
from paceline.rpc.draft_codec import sample_from_proto, sample_to_proto
from paceline.trainer import learner_link
from paceline.trainer.checkpoint import load_draft
from paceline.trainer.heads_file import HeadsFile
from paceline.trainer.learner_link import LearnerLink
from paceline.trainer.learner_options import LearnerOptions
from paceline.v1 import samples_pb2
from tests.unit.trainer.traffic import poisoned, samples_of, small_draft
from tests.waiting import until

Streamed = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_draft(target, tmp_path_factory.mktemp("drafts") / "draft")


@pytest.fixture(scope="module")
def samples(target: Path) -> Streamed:
    found = [*samples_of(target, 24, domain="a"), *samples_of(target, 24, domain="b", seed=9)]
    return [(f"{i}-0", sample_to_proto(s).SerializeToString()) for i, s in enumerate(found)]


@asynccontextmanager
async def running(options: LearnerOptions) -> AsyncIterator[LearnerLink]:
    link = LearnerLink()
    run: asyncio.Task[None] | None = None
    try:
        await link.start(options)
        run = asyncio.create_task(link.run())
        yield link
    finally:
        await link.close()
        if run is not None:
            with suppress(UnavailableError):
                await run


def options(draft: Path, state: Path | str = "") -> LearnerOptions:
    return LearnerOptions(
        str(draft), str(state), learning_rate=5e-3, batch_tokens=512, held_out_every=4
    )


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pid_of(link: LearnerLink) -> int:
    assert link._process is not None
    return link._process.pid


async def test_it_trains_while_granted_and_rests_otherwise(
    draft: Path, samples: Streamed, tmp_path: Path
) -> None:
    async with running(options(draft, tmp_path / "state")) as link:
        pid = pid_of(link)
        assert os.sched_getscheduler(pid) == os.SCHED_IDLE
        corrupt = poisoned(
            sample_from_proto(samples_pb2.Sample.FromString(samples[0][1])),
            "tail_mass",
            0,
            float("nan"),
        )
        bad = [("48-0", b"\xff\xff\xff"), ("49-0", sample_to_proto(corrupt).SerializeToString())]
        link.feed([*samples, *bad])
        # Without a grant samples are taken in and nothing else is done.
        await link.save()
        before = cpu_s(pid)
        await asyncio.sleep(0.4)
        assert cpu_s(pid) - before <= 0.025
        assert link.progress.num_micro_steps == 0

        link.grant(threads=1, seconds=60.0)
        await until(lambda: link.progress.num_steps >= 10, 30.0)
        await link.pause()
        progress = link.progress
        assert not progress.is_training
        assert dict(progress.samples_by_domain) == {"a": 24, "b": 24}
        assert progress.num_samples == 48 and progress.num_corrupt == 2
        assert progress.stream_id == "49-0"
        assert progress.num_tokens >= 10 * 512 and progress.loss > 0 and progress.trained_s > 0
        steps = progress.num_micro_steps
        before = cpu_s(pid)
        await asyncio.sleep(0.3)
        assert link.progress.num_micro_steps == steps and cpu_s(pid) - before <= 0.025

        # A grant ends by itself.
        link.grant(threads=1, seconds=0.2)
        await until(lambda: link.progress.is_training or link.progress.num_micro_steps > steps)
        await until(lambda: not link.progress.is_training)

        # What it learned: both drafts on the same samples, only while there is a grant.
        with pytest.raises(DeadlineError):
            await link.judge(str(draft), timeout_s=0.2)
        link.grant(threads=1, seconds=60.0)
        domains = (await link.judge(str(draft))).domains
        assert [domain.domain for domain in domains] == ["a", "b"]
        both = [sample for domain in domains for sample in domain.samples]
        assert all(sample.num_positions == 24 for sample in both) and len(both) >= 4
        assert sum(s.candidate.overlap for s in both) > sum(s.incumbent.overlap for s in both)
        # Of new samples it tells what they were like before they were learned from.
        link.feed(samples)
        steps = link.progress.num_steps
        await until(lambda: link.progress.num_steps > steps, 30.0)
        judged = await link.judge(str(draft), is_own=True)
        new = judged.new_samples
        assert len(new) + len(both) == 48 and {sample.domain for sample in new} == {"a", "b"}
        await link.pause()

        exported = await link.export(str(tmp_path / "out"))
        assert exported.num_tokens == link.progress.num_tokens and exported.num_samples == 96
        load_draft(tmp_path / "out")
        with pytest.raises(InternalError, match="No such") as failed:
            await link.export(str(tmp_path / "missing" / "out"))
        assert failed.value.reason == "disk-failed"
        with pytest.raises(InternalError):
            await link.reset(str(tmp_path / "missing"))
        await link.reset(str(draft))
        await link.save()
        assert len(list((tmp_path / "state").iterdir())) == 2


async def test_a_pause_is_obeyed_within_a_micro_step(draft: Path, samples: Streamed) -> None:
    async with running(options(draft)) as link:
        link.feed(samples)
        link.grant(threads=1, seconds=60.0)
        await until(lambda: link.progress.num_steps >= 3, 30.0)
        waits = []
        for _ in range(12):
            link.grant(threads=1, seconds=60.0)
            await asyncio.sleep(0.05)
            begun = time.monotonic()
            await link.pause()
            waits.append(time.monotonic() - begun)
        # At idle priority a busy machine keeps it from answering at all, so the best ones count.
        assert sorted(waits)[2] < 0.05


async def test_a_killed_learner_goes_on_from_its_state(
    draft: Path, samples: Streamed, tmp_path: Path
) -> None:
    link = LearnerLink()
    state = tmp_path / "state"
    ready = await link.start(options(draft, state))
    assert ready.stream_id == "" and ready.progress.num_samples == 0
    run = asyncio.create_task(link.run())
    link.feed(samples)
    link.grant(threads=1, seconds=60.0)
    await until(lambda: link.progress.num_steps >= 2, 30.0)
    await link.save()
    saved = link.progress.num_steps
    # It is killed in the middle of a grant, with a question open.
    question = asyncio.create_task(link.judge(str(tmp_path), timeout_s=30.0))
    await asyncio.sleep(0.05)
    os.kill(ready.pid, signal.SIGKILL)
    with pytest.raises(UnavailableError):
        await run
    with pytest.raises((UnavailableError, InternalError)):
        await question
    calls: list[Callable[[], Awaitable[None]]] = [link.pause, link.save]
    for call in calls:
        with pytest.raises(UnavailableError):
            await call()
    with pytest.raises(UnavailableError):
        link.grant(1, 1.0)
    await link.close()

    again = LearnerLink()
    ready = await again.start(options(draft, state))
    assert ready.stream_id == "47-0"
    assert ready.progress.num_samples == 48 and ready.progress.num_steps >= saved
    run = asyncio.create_task(again.run())
    before = ready.progress.num_steps
    again.grant(threads=1, seconds=60.0)
    await until(lambda: again.progress.num_steps > before, 30.0)
    await again.close()
    with pytest.raises(UnavailableError):
        await run


async def test_a_learner_that_cannot_start_says_why(tmp_path: Path) -> None:
    link = LearnerLink()
    with pytest.raises(UnavailableError, match=r"config\.json") as failed:
        await link.start(options(tmp_path))
    assert failed.value.reason == "unsupported-model"
    await link.close()


async def test_what_waits_for_a_stopped_learner_is_bounded(
    draft: Path, samples: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_link, "MAX_BUFFERED_BYTES", 1 << 20)
    async with running(options(draft)) as link:
        os.kill(pid_of(link), signal.SIGSTOP)
        try:
            with pytest.raises(ExhaustedError):
                for _ in range(1000):
                    link.feed(samples)
            with pytest.raises(DeadlineError):
                await link.pause(timeout_s=0.1)
        finally:
            os.kill(pid_of(link), signal.SIGCONT)


def test_the_link_needs_no_torch() -> None:
    code = "import sys, paceline.trainer.learner_link; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@dataclass
class Held:
    """Whoever keeps a learner, as heads_file.py sees it."""

    learner: LearnerLink


async def test_it_learns_heads_and_they_are_written_where_an_engine_finds_them(
    target: Path, tmp_path: Path
) -> None:
    found = samples_of(target, 24, domain="a", has_hidden=True)
    found += samples_of(target, 2, domain="a")
    how = LearnerOptions(
        "", drafter="medusa", target=str(target), num_heads=2, batch_tokens=64, held_out_every=4
    )
    out = tmp_path / "heads"
    async with running(how) as link:
        keeper: Any = Held(link)
        heads = HeadsFile(keeper, out, steps=2)
        await heads.look()
        assert not out.exists()
        link.feed([(f"{i}-0", sample_to_proto(s).SerializeToString()) for i, s in enumerate(found)])

        link.grant(threads=1, seconds=60.0)
        await until(lambda: link.progress.num_steps >= 3, 30.0)
        await link.pause()
        assert link.progress.num_samples == 24 and link.progress.num_corrupt == 0
        await heads.look()
        learned, version = load_medusa_heads(out, target)
        assert learned.num_heads == 2
        await heads.look()
        assert load_medusa_heads(out, target)[1] == version
        # The gate's questions are answered for heads, too.
        await link.reset(str(out))
        link.grant(threads=1, seconds=60.0)
        (domain,) = (await link.judge(str(out))).domains
        assert all(s.candidate.overlap == s.incumbent.overlap for s in domain.samples)
    learned_card = json.loads((out / "paceline_draft.json").read_text("utf-8"))["learned"]
    assert learned_card["num_left_out"] == 2
