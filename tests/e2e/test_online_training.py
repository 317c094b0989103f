"""The whole loop on a running platform: live traffic teaches a draft that fits nothing."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.v1.inference_pb2 import SpeculationParams
from tests.e2e.client import Answer, Client, greedy
from tests.e2e.drafts import shaken
from tests.platform import Platform

LONGEST_S = 150.0
PROMPTS = [
    f"{name} has {count} {things} and buys {more} more. How many {things} does {name} have now?"
    for name in ("Tom", "Anna", "Ben", "Lucy", "Sam", "Nora")
    for count, more in ((3, 4), (12, 5), (7, 20), (31, 2))
    for things in ("apples", "books", "pens")
]


@pytest.fixture(scope="module")
def ignorant_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo draft with its layers shaken until hardly a guess is right."""
    return shaken(tmp_path_factory.mktemp("ignorant") / "draft", 2.0, "layers")


@pytest.fixture(scope="module")
def platform(ignorant_draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    directory = tmp_path_factory.mktemp("online")
    flags = ("--draft", str(ignorant_draft), "--draft-registry", str(directory / "registry"))
    env = {"PACELINE_CANDIDATE_STEPS": "8", "PACELINE_LEARNING_RATE": "0.003"}
    # What is captured is bounded by a share of the time, of which tests have little.
    with Platform(directory, *flags, env={**env, "PACELINE_CAPTURE_SHARE": "0.1"}) as up:
        yield up


def versions(platform: Platform) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "paceline.cli", "draft", "list", "--json"]
    done = subprocess.run(
        [*command, "--gateway", platform.http], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


async def ask(client: Client, prompt: str, mode: str, *, may_train: bool = True) -> Answer:
    request = greedy(prompt, max_tokens=48, ignore_eos=True)
    request.speculation.CopyFrom(SpeculationParams(mode=mode))
    request.allow_training = may_train
    return await client.generate(request)


async def accepted_ratio(client: Client) -> float:
    """Return the share of drafted tokens that are accepted, and compare answers with plain ones."""
    drafted = accepted = 0
    for prompt in PROMPTS[::12]:
        plain = await ask(client, prompt, "OFF", may_train=False)
        answer = await ask(client, prompt, "model", may_train=False)
        assert answer.ids == plain.ids and answer.text == plain.text
        drafted += answer.usage[0].drafted_tokens
        accepted += answer.usage[0].accepted_tokens
    # With a draft that is always wrong none is made.
    return accepted / drafted if drafted else 0.0


async def test_live_traffic_teaches_the_draft(platform: Platform) -> None:
    (floor,) = versions(platform)
    async with Client(platform.grpc) as client:
        before = await accepted_ratio(client)
        begun_s, number = time.monotonic(), 0
        while True:
            await ask(client, PROMPTS[number % len(PROMPTS)], "model")
            number += 1
            if number % 20 == 0:
                await asyncio.sleep(1.0)
                active = [v for v in versions(platform) if v["stage"] == "active"]
                if active[0]["version"] != floor["version"]:
                    break
            assert time.monotonic() - begun_s < LONGEST_S, versions(platform)
        learned = active[0]
        assert [d["stage"] for d in learned["decisions"]] == ["canary", "active"]
        assert learned["parent"] == floor["version"] and learned["num_samples"] > 0
        assert learned["scores"][0]["acceptance"] > learned["scores"][0]["incumbent_acceptance"]
        assert await accepted_ratio(client) > before + 0.1
