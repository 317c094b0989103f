"""Versions of a draft on a running platform: an operator changes them, answers stay the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.cli.status import fetch_status
from paceline.v1.inference_pb2 import SpeculationParams
from tests.checkpoints import DEMO
from tests.e2e.client import Answer, Client, greedy
from tests.e2e.drafts import shaken
from tests.platform import Platform
from tests.waiting import until, until_sync

PROMPT = "Tom has 3 apples and buys 4 more. How many apples does Tom have now?"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    directory = tmp_path_factory.mktemp("drafts")
    flags = ("--prefill", "1", "--decode", "2", "--draft-registry", str(directory / "registry"))
    with Platform(directory, *flags) as up:
        yield up


@pytest.fixture(scope="module")
def other_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo draft with slightly other weights."""
    return shaken(tmp_path_factory.mktemp("other") / "draft", 0.01)


def draft(platform: Platform, *args: str) -> Any:
    command = [sys.executable, "-m", "paceline.cli", "draft", *args, "--json"]
    command += ["--gateway", platform.http]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


async def asked(platform: Platform, *, mode: str) -> Answer:
    request = greedy(PROMPT, max_tokens=48, ignore_eos=True)
    request.speculation.CopyFrom(SpeculationParams(mode=mode))
    async with Client(platform.grpc) as client:
        return await client.generate(request)


async def until_drafted_with(platform: Platform, version: str, expected: Answer) -> None:
    """Ask until answers come with a version, several times in a row, since workers take turns."""
    num_in_a_row = 0

    async def is_drafted() -> bool:
        nonlocal num_in_a_row
        answer = await asked(platform, mode="model")
        assert answer.ids == expected.ids and answer.text == expected.text
        assert answer.usage[0].drafted_tokens > 0
        is_new = answer.usage[0].draft_version == version
        num_in_a_row = num_in_a_row + 1 if is_new else 0
        return num_in_a_row == 4

    await until(is_drafted, 30)


async def test_an_offered_version_is_drafted_with_and_taken_back(
    platform: Platform, other_draft: Path
) -> None:
    (floor,) = draft(platform, "list")
    plain = await asked(platform, mode="OFF")
    await until_drafted_with(platform, floor["version"], plain)
    offered = draft(platform, "offer", str(other_draft), "--force")
    assert (offered["version"] != floor["version"], offered["stage"]) == (True, "canary")
    draft(platform, "pin", offered["version"])
    await until_drafted_with(platform, offered["version"], plain)
    draft(platform, "unpin")
    assert draft(platform, "rollback")["version"] == floor["version"]
    await until_drafted_with(platform, floor["version"], plain)


async def test_serving_outlives_the_trainer_which_comes_back(
    platform: Platform, other_draft: Path
) -> None:
    (floor,) = [record for record in draft(platform, "list") if record["is_floor"]]
    plain = await asked(platform, mode="OFF")
    killed = platform.kill("trainer")
    await until_drafted_with(platform, floor["version"], plain)
    platform.wait_replaced("trainer", 0, killed)

    def is_back() -> bool:
        command = [sys.executable, "-m", "paceline.cli", "draft", "list"]
        done = subprocess.run([*command, "--gateway", platform.http], capture_output=True)
        return done.returncode == 0

    until_sync(is_back, 30)
    (offered,) = [record for record in draft(platform, "list") if not record["is_floor"]]
    draft(platform, "pin", offered["version"])
    await until_drafted_with(platform, offered["version"], plain)


async def test_a_draft_for_one_domain_comes_beside_the_others_and_goes(
    platform: Platform, tmp_path: Path
) -> None:
    plain = await asked(platform, mode="OFF")
    directory = tmp_path / "draft"
    shutil.copytree(DEMO / "draft", directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "made_for": "code"}))
    general = [r for r in draft(platform, "list", "--drafter", "model") if r["stage"] == "active"]
    member = draft(platform, "offer", str(directory), "--drafter", "model:code", "--force")
    assert (member["drafter"], member["stage"]) == ("model:code", "active")

    def held_by() -> list[bool]:
        members = fetch_status(platform.http)["members"]
        return ["model:code" in m["drafters"] for m in members if m["role"] == "decode"]

    until_sync(lambda: held_by() == [True, True], 30)
    answer = await asked(platform, mode="model:code")
    assert answer.ids == plain.ids and answer.text == plain.text
    assert answer.usage[0].draft_version == member["version"]
    assert [r["version"] for r in general] == [
        r["version"]
        for r in draft(platform, "list", "--drafter", "model")
        if r["stage"] == "active"
    ], "nothing was displaced"
    draft(platform, "remove", "model:code")
    until_sync(lambda: held_by() == [False, False], 30)
