"""`paceline draft list|show|...` as an operator types it, against a real trainer's door."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor

from paceline.cli.ports import free_port
from paceline.v1.drafts_pb2 import DraftRecord
from tests.unit.cli.test_status import STATUS, http_server
from tests.unit.trainer.rig import Rig, trainer_rig
from tests.unit.trainer.small_drafts import make_draft


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with trainer_rig(tmp_path) as running:
        yield running


async def command(*args: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "paceline.cli", "draft", *args),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def answer(*args: str) -> Any:
    code, out, err = await command(*args, "--json")
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


async def test_an_operator_offers_lists_shows_pins_and_rolls_back(rig: Rig, tmp_path: Path) -> None:
    at = ("--endpoint", rig.address)
    drafts = [make_draft(tmp_path / f"draft-{i}", i) for i in (1, 2)]
    (floor,) = await answer("list", *at)
    assert (floor["stage"], floor["is_floor"]) == ("active", True)
    names = {field.name for field in _fields(DraftRecord.DESCRIPTOR)}
    assert set(floor) == names

    asked = await answer("offer", str(drafts[0]), *at)
    assert asked["stage"] == "candidate"
    forced = await answer("offer", str(drafts[1]), "--force", *at)
    assert (forced["stage"], forced["parent"]) == ("canary", floor["version"])
    assert [record["version"] for record in await answer("list", *at)] == [
        record["version"] for record in (forced, asked, floor)
    ]
    assert (await answer("show", forced["version"][:5], *at)) == forced

    taken = await answer("pin", forced["version"], *at)
    assert (taken["version"], taken["stage"]) == (forced["version"], "active")
    await answer("unpin", *at)
    back = await answer("rollback", *at)
    assert back["version"] == floor["version"]
    shown = await answer("show", forced["version"], *at)
    assert shown["stage"] == "rolled-back"
    pinned = await answer("pin", asked["version"], *at)
    assert pinned["version"] == asked["version"] and pinned["is_pinned"]
    assert not (await answer("unpin", *at))["is_pinned"]


async def test_an_operator_brings_in_a_draft_for_one_domain_and_removes_it(
    rig: Rig, tmp_path: Path
) -> None:
    at = ("--endpoint", rig.address)
    draft = make_draft(tmp_path / "draft", 1)
    member = ("--drafter", "model:code")
    offered = await answer("offer", str(draft), *member, "--force", *at)
    assert (offered["stage"], offered["drafter"], offered["rank"]) == ("active", "model:code", 0)
    assert await answer("list", *member, *at) == [offered]
    assert len(await answer("list", *at)) == 2
    assert [entry.drafter for entry in rig.attendants.plan or ()] == ["model", "model:code"]
    removed = await answer("remove", "model:code", *at)
    assert (removed["version"], removed["stage"]) == (offered["version"], "rolled-back")
    assert [entry.drafter for entry in rig.attendants.plan or ()] == ["model"]
    assert (await answer("pin", offered["version"], *member, *at))["is_pinned"]


async def test_tables_name_what_matters(rig: Rig, tmp_path: Path) -> None:
    at = ("--endpoint", rig.address)
    floor = rig.registry.floor()
    assert floor is not None
    code, listed, _ = await command("list", *at)
    head, row = listed.splitlines()
    assert code == 0 and head.split()[:3] == ["version", "drafter", "stage"]
    assert row.split()[:4] == [floor.version, "model", "active,", "floor"]
    code, shown, _ = await command("show", floor.version, *at)
    assert code == 0 and floor.digest in shown
    assert all(decision.reason in shown for decision in floor.decisions)


async def test_troubles_are_one_line_with_a_reason(rig: Rig, tmp_path: Path) -> None:
    at = ("--endpoint", rig.address)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    torn = make_draft(tmp_path / "torn", 3)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    large = make_draft(tmp_path / "large", 4, num_floats=100_000)
    for args, part in (
        (("show", "0" * 12, *at), "NOT_FOUND (draft-not-found)"),
        (("rollback", *at), "FAILED_PRECONDITION"),
        (("pin", "0" * 12, *at), "draft-not-found"),
        (("rollback", "--drafter", "no such", *at), "INVALID_ARGUMENT"),
        (("remove", "model", *at), "no-member"),
        (("remove", "model:none", *at), "draft-not-found"),
        (("remove", "code", *at), "INVALID_ARGUMENT"),
        (("offer", str(tmp_path / "nothing"), *at), "no checkpoint"),
        (("offer", str(bare), *at), "no safetensors"),
        (("offer", str(torn), *at), "not-a-draft"),
        (("offer", str(large), *at), "draft-too-large"),
        (("list", "--endpoint", f"127.0.0.1:{free_port()}"), "UNAVAILABLE"),
        (("list", "--gateway", f"127.0.0.1:{free_port()}"), "no gateway answers"),
    ):
        code, out, err = await command(*args)
        assert code == 1 and out == "", args
        assert err.startswith(f"paceline draft {args[0]}: ") and err.count("\n") == 1, err
        assert part in err, (args, err)


async def test_the_trainer_is_found_through_the_gateway(rig: Rig) -> None:
    trainer = {"id": "trainer-0", "role": "trainer", "address": rig.address}
    leaving = {**trainer, "address": "127.0.0.1:1", "is_draining": True}
    fleet = {**STATUS, "members": [*STATUS["members"], leaving, trainer]}
    with http_server(200, json.dumps(fleet).encode()) as gateway:
        (floor,) = await answer("list", "--gateway", gateway)
    assert floor["is_floor"]
    with http_server(200, json.dumps(STATUS).encode()) as gateway:
        code, _, err = await command("list", "--gateway", gateway)
    assert code == 1 and "has no trainer" in err


def _fields(descriptor: Descriptor) -> Any:
    return descriptor.fields
