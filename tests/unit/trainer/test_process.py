"""The trainer's process: its place in the fleet, its registry, its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paceline.cli.draft_client import open_draft_client
from paceline.domain.draft_records import DraftRecord
from paceline.domain.member import Role
from tests.redis_server import redis_server, redis_url
from tests.unit.trainer.small_drafts import make_draft
from tests.unit.trainer.trainer_process import TrainerProcess

__all__ = ["redis_server", "redis_url"]

Maker = Callable[..., TrainerProcess]


@pytest.fixture
def make_trainer(redis_url: str, tmp_path: Path) -> Iterator[Maker]:
    made: list[TrainerProcess] = []

    def make(*flags: str, name: str = "trainer-0") -> TrainerProcess:
        made.append(TrainerProcess(redis_url, tmp_path, ("--no-training", *flags), name))
        return made[-1]

    yield make
    for trainer in made:
        trainer.kill()


async def records(address: str) -> list[DraftRecord]:
    async with open_draft_client(address) as client:
        return await client.list()


async def test_it_brings_the_floor_keeps_offers_and_ends_in_order(
    make_trainer: Maker, tmp_path: Path
) -> None:
    registry = tmp_path / "registry"
    trainer = make_trainer("--draft-registry", str(registry))
    member = await trainer.start()
    assert member.role is Role.TRAINER
    (floor,) = await records(member.address)
    assert floor.is_floor and member.draft_version == floor.version
    assert not trainer.has_torch()
    draft = make_draft(tmp_path / "draft", 1)
    async with open_draft_client(member.address) as client:
        paths = sorted(draft.iterdir())
        offered = await client.offer(paths, "model", True)
        assert (await client.get(offered.version[:6])).version == offered.version
    assert trainer.stop() == 0
    assert not any(line["level"] == "error" for line in trainer.log_lines)

    again = await make_trainer("--draft-registry", str(registry)).start()
    assert again.draft_version == floor.version, "the offer is on trial"
    assert {r.version for r in await records(again.address)} == {floor.version, offered.version}


async def test_a_registry_has_one_trainer_and_others_find_a_place(
    make_trainer: Maker, tmp_path: Path
) -> None:
    named = ("--draft-registry", str(tmp_path / "registry"))
    await make_trainer(*named, name="a").start()
    second = make_trainer(*named, name="b")
    second.launch()
    assert second.wait() == 1
    assert second.log_lines[-1]["reason"] == "registry-in-use"
    by_default = [make_trainer(name=name) for name in ("c", "d")]
    for trainer in by_default:
        await trainer.start()
    homes = {
        line["registry"]
        for trainer in by_default
        for line in trainer.log_lines
        if line["event"] == "ready"
    }
    assert len(homes) == 2


def test_without_a_floor_it_says_so(make_trainer: Maker, tmp_path: Path) -> None:
    trainer = make_trainer("--draft", str(tmp_path / "none"))
    trainer.launch()
    assert trainer.wait() == 1
    assert trainer.log_lines[-1]["event"] == "start-failed"
