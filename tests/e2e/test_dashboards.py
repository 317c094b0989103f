"""Every query of dashboards and rules brings data from a running platform, by a real Prometheus.

The platform is given what makes series move: prompts with a shared beginning, KV that moves
between two nodes, drafts, traffic to learn from in bursts that training has to yield to, a version
that is offered and taken back, a request that is refused.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from paceline.cli.ports import free_port
from paceline.v1.inference_pb2 import GenerateRequest, SpeculationParams
from scripts.check_dashboards import DASHBOARDS, Answer, Prometheus, check, panels
from tests.e2e.client import Client, greedy
from tests.e2e.conftest import KV_STORES, WHOLE_WAY
from tests.e2e.drafts import shaken
from tests.e2e.platform_prometheus import PERIOD_S, PlatformPrometheus
from tests.e2e.probe import members
from tests.platform import Platform
from tests.waiting import until, until_sync

RATE_INTERVAL = "20s"
"""Longer than the pauses between bursts."""
LONGEST_S = 120.0
BURST, PAUSE_S = 6, 1.5
BEGINNING = "You are a patient teacher who explains every step of a sum to a child. " * 3
PROMPTS = [
    f"{BEGINNING}{name} has {count} {thing} and buys {more} more. How many does {name} have now?"
    for name in ("Tom", "Anna", "Ben", "Lucy", "Sam", "Nora")
    for count, more in ((3, 4), (12, 5), (7, 20), (31, 2))
    for thing in ("apples", "books", "pens")
]
MODES = ("AUTO", "model", "model", "trie", "OFF")


@pytest.fixture(scope="module")
def prometheus_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def platform(prometheus_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    directory = tmp_path_factory.mktemp("dashboards")
    flags = ["--prefill", "1", "--decode", "1", *KV_STORES["grpc"]]
    flags += ["--draft-registry", str(directory / "registry")]
    # Holds until Prometheus is there, then sees that a decode worker is lacking.
    flags += ["--autoscale", "--prometheus-url", f"http://127.0.0.1:{prometheus_port}"]
    flags += ["--min-prefill", "1", "--max-prefill", "1", "--min-decode", "2", "--max-decode", "2"]
    # What is captured is bounded by a share of the time, of which tests have little. Training runs
    # between bursts whatever else the machine does, and each burst takes its grant back.
    env = {**WHOLE_WAY, "PACELINE_CAPTURE_SHARE": "0.1", "PACELINE_SPARE": "idle-machine"}
    with Platform(directory, *flags, env=env) as up:
        yield up


@pytest.fixture(scope="module")
def prometheus(
    platform: Platform, prometheus_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PlatformPrometheus]:
    directory = tmp_path_factory.mktemp("prometheus")
    with PlatformPrometheus(platform, directory, prometheus_port) as server:
        yield server


@pytest.fixture(scope="module")
def other_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo draft with slightly other weights."""
    return shaken(tmp_path_factory.mktemp("other") / "draft", 0.01)


@asynccontextmanager
async def traffic(platform: Platform) -> AsyncIterator[None]:
    """Send bursts of requests, with pauses that leave room for training, while in the block."""
    stop = asyncio.Event()
    async with Client(platform.grpc) as client:
        sending = asyncio.create_task(send_bursts(client, stop))
        try:
            yield
        finally:
            stop.set()
            await sending


async def send_bursts(client: Client, stop: asyncio.Event) -> None:
    prompts, modes = itertools.cycle(PROMPTS), itertools.cycle(MODES)
    while not stop.is_set():
        requests = []
        for prompt, mode in itertools.islice(zip(prompts, modes, strict=False), BURST):
            request = greedy(prompt, max_tokens=48, ignore_eos=True)
            request.speculation.CopyFrom(SpeculationParams(mode=mode))
            requests.append(client.generate(request))
        await asyncio.gather(*requests)
        with pytest.raises(grpc.aio.AioRpcError):
            await client.generate(GenerateRequest(max_tokens=8))
        await asyncio.sleep(PAUSE_S)


def draft(platform: Platform, *args: str) -> Any:
    command = [sys.executable, "-m", "paceline.cli", "draft", *args, "--json"]
    command += ["--gateway", platform.http]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


async def test_every_query_of_dashboards_and_rules_brings_data(
    platform: Platform, prometheus: PlatformPrometheus, other_draft: Path
) -> None:
    begun_s = time.monotonic()
    server = Prometheus(prometheus.url)

    def ask_all() -> list[Answer]:
        range_s = time.monotonic() - begun_s + 5
        return check(server, range_s, RATE_INTERVAL)

    async with traffic(platform):
        await until(lambda: server.get("query", query="sum(up) > 0")["result"])
        await asyncio.to_thread(try_another_draft, platform, other_draft)
        answers = await asyncio.to_thread(ask_all)
        while not all(answer.num_series for answer in answers):
            assert time.monotonic() - begun_s < LONGEST_S, listed(answers)
            await asyncio.sleep(PERIOD_S)
            answers = await asyncio.to_thread(ask_all)
    print(listed(answers))
    assert len(answers) > 320


def test_a_query_without_an_answer_is_found(prometheus: PlatformPrometheus, tmp_path: Path) -> None:
    board = json.loads((DASHBOARDS / "paceline-runtime.json").read_text())
    number, *_ = panels(board)
    number["targets"][0]["expr"] = "paceline_nothing"
    number["targets"].append({**number["targets"][0], "refId": "B", "expr": "sum("})
    (tmp_path / "broken.json").write_text(json.dumps(board))
    command = [sys.executable, "scripts/check_dashboards.py", "--prometheus", prometheus.url]
    done = subprocess.run(
        [*command, "--dashboards", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    (nothing,) = re.findall(r"^ +0  .*Scraped / A\n +(.*)$", done.stdout, re.MULTILINE)
    (refused,) = re.findall(r"^ +0  .*Scraped / B\n +sum\(\n +(.*)$", done.stdout, re.MULTILINE)
    assert nothing == "paceline_nothing" and "parse error" in refused
    assert re.search(r"^ +[1-9]\d*  .*Not answering / A$", done.stdout, re.MULTILINE)


def try_another_draft(platform: Platform, directory: Path) -> None:
    """Have workers draft with another version, then with the one before again."""
    offered = draft(platform, "offer", str(directory), "--force")["version"]
    draft(platform, "pin", offered)
    drafting = lambda: [each["draft_version"] for each in members(platform, "decode")]  # noqa: E731
    until_sync(lambda: drafting() == [offered, offered], 60)
    draft(platform, "unpin")
    draft(platform, "rollback")


def listed(answers: list[Answer]) -> str:
    num_empty = sum(not answer.num_series for answer in answers)
    # Those without data at the end, where they are seen.
    lines = map(str, sorted(answers, key=lambda answer: not answer.num_series))
    return "\n".join([*lines, f"{len(answers)} queries, {num_empty} without data"])
