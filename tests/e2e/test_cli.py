"""The commands of the README, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from paceline.v1.inference_pb2 import SamplingParams
from tests.checkpoints import DEMO
from tests.e2e.client import Client, decode, greedy
from tests.platform import Platform

PROMPT = "Question: Tom has 3 apples and buys 4 more. How many apples has he?\nAnswer:"


def paceline(
    *words: str, timeout_s: float = 60.0, **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paceline.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, **options)


async def answer_of(platform: Platform, prompt: str, **fields: Any) -> str:
    async with Client(platform.grpc) as client:
        return (await client.generate(greedy(prompt, **fields))).text[0]


async def test_generate_prints_the_answer(demo_platform: Platform) -> None:
    where = ("--endpoint", demo_platform.grpc, "--temperature", "0", "--max-tokens", "30")
    done = paceline("generate", PROMPT, *where)
    assert done.returncode == 0, done.stderr
    expected = await answer_of(demo_platform, PROMPT, max_tokens=30)
    assert done.stdout.rstrip("\n") == expected.rstrip("\n")


async def test_generate_ends_before_a_stop_string(demo_platform: Platform) -> None:
    where = ("--endpoint", demo_platform.grpc, "--temperature", "0", "--max-tokens", "40")
    whole = await answer_of(demo_platform, PROMPT, max_tokens=40)
    stop = whole.strip().split()[2]
    done = paceline("generate", PROMPT, *where, "--stop", stop)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == whole[: whole.index(stop)].rstrip("\n")
    assert stop not in done.stdout


async def test_generate_streams_whole_characters(demo_platform: Platform) -> None:
    """At a high temperature the model writes bytes of all kinds."""
    sampling = ("--temperature", "3", "--seed", "5", "--max-tokens", "200", "--ignore-eos")
    done = paceline("generate", PROMPT, "--endpoint", demo_platform.grpc, *sampling)
    assert done.returncode == 0, done.stderr
    async with Client(demo_platform.grpc) as client:
        request = greedy(PROMPT, max_tokens=200, ignore_eos=True)
        request.sampling.CopyFrom(SamplingParams(temperature=3.0, seed=5))
        answer = await client.generate(request)
    whole = decode(DEMO, answer.ids[0])
    assert answer.text[0] == whole
    assert done.stdout.count("\N{REPLACEMENT CHARACTER}") == whole.count(
        "\N{REPLACEMENT CHARACTER}"
    )


def test_generate_says_what_is_wrong(demo_platform: Platform) -> None:
    done = paceline("generate", "x", "--endpoint", demo_platform.grpc, "--top-p", "2")
    assert done.returncode == 1
    assert "INVALID_ARGUMENT" in done.stderr and "sampling.top_p" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = paceline("generate", "x", "--endpoint", "127.0.0.1:1", "--timeout", "5")
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stderr


def test_status_shows_the_fleet(demo_platform: Platform) -> None:
    done = paceline("status", "--endpoint", demo_platform.http, "--once")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("gateway-0", "prefill-1", "decode-1", "kv-0"))
    done = paceline("status", "--endpoint", demo_platform.http, "--json")
    assert {m["role"] for m in json.loads(done.stdout)["members"]} == {
        "gateway",
        "prefill",
        "decode",
        "kvstore",
        "trainer",
    }


@pytest.mark.timeout(300)
def test_the_demo_shows_what_it_promises() -> None:
    done = paceline("demo", timeout_s=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["requests"] == report["completed"] > 10
    assert report["kv_blocks_moved"] > 0
    assert report["kv_bytes_moved"] > report["kv_blocks_moved"]
    assert report["prefix_hit_tokens"] > 0
    assert 0 < report["ttft_p50_s"] < 30
    assert report["tok_s"] > 0


@pytest.mark.parametrize("module", ["gateway", "worker", "kvstore"])
def test_every_process_tells_its_version_and_settings(module: str) -> None:
    from paceline import __version__

    command = [sys.executable, "-m", f"paceline.{module}"]
    for flag, expected in (("--version", __version__), ("--help", "--redis-url")):
        done = subprocess.run([*command, flag], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        assert expected in done.stdout
    done = subprocess.run([*command, "--no-such"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no-such" in done.stderr
