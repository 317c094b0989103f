"""Benches run in a process of their own and end with one line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.cli.bench import child
from paceline.cli.errors import CommandError
from paceline.engine.bench.options import BenchOptions
from tests.checkpoints import DEMO

KEYS = {
    "peer",
    "version",
    "dtype",
    "prompt_len",
    "gen_len",
    "concurrency",
    "prefill_tok_s",
    "decode_tok_s",
    "total_s",
    "ttft_s",
    "peak_rss_mb",
}


def paceline(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paceline.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_engine_bench_prints_its_report_last() -> None:
    sizes = ("--prompt-len", "24", "--gen-len", "3", "--concurrency", "2", "--threads", "1")
    done = paceline("bench", "engine", "--model", str(DEMO), *sizes)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.keys() >= KEYS
    assert (report["peer"], report["model"], report["threads"]) == ("paceline", "demo", 1)
    assert len(report["head"]) == 3
    assert 0 <= report["other_cpu_share"] <= 1


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        (("chunking", "--streams", "2", "--prompt-len", "64"), {"undisturbed", "on", "off"}),
        (("cost",), {"median_error", "p95_error", "n"}),
    ],
)
def test_other_benches_print_nothing_but_their_report(
    flags: tuple[str, ...], keys: set[str]
) -> None:
    name, *sizes = flags
    done = paceline("bench", name, "--model", str(DEMO), "--threads", "1", "--json", *sizes)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report.keys() >= keys
    assert (report["model"], report["dtype"], report["threads"]) == ("demo", "f32", 1)


SPEC_KEYS = {
    *("drafter", "concurrency", "temperature", "tokens", "target_steps", "emitted_per_step"),
    *("acceptance", "tok_s", "tok_s_off", "speedup", "identical_to_off"),
}


@pytest.mark.parametrize(
    "flags",
    [
        ("--drafter", "auto", "--concurrency", "2", "--deepen", "2"),
        ("--drafter", "recycling+trie", "--temperature", "0.7"),
        ("--drafter", "model", "--draft", str(DEMO), "--builder", "chain", "--depth", "2"),
        ("--drafter", "off"),
        ("--drafter", "trie", "--capture"),
    ],
)
def test_the_spec_bench_compares_with_no_speculation(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "one two one two one", "domain": "words"},
        {"messages": [{"role": "user", "content": "What is 2 + 3?"}]},
        {"turns": ["Write a poem.", "Longer."], "category": "writing"},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    sizes = ("--max-tokens", "10", "--rounds", "1", "--threads", "1", "--ignore-eos", "--json")
    done = paceline(
        "bench", "spec", "--prompts", str(prompts), "--model", str(DEMO), *sizes, *flags
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report.keys() >= SPEC_KEYS
    assert (report["drafter"], report["tokens"]) == (flags[1], 30)
    assert report["identical_to_off"] is True
    assert set(report["domains"]) == {"", "words", "writing"}
    if flags[1] == "model":
        # The target drafts for itself.
        assert report["acceptance"] == 1.0 and report["target_steps"] < 30
    if flags[1] == "off":
        assert report["target_steps"] == 30
    assert ("capture_cost_ratio" in report) == ("--capture" in flags)
    if "--capture" in flags:
        assert report["capture_is_identical"] is True and report["capture_cost_ratio"] > 0
        assert report["captured_tokens"] >= 8 * report["samples"] > 0


@pytest.mark.parametrize(
    ("line", "flags", "named"),
    [
        ("nonsense", (), ":1"),
        ('{"text": "x"}', (), '"messages"'),
        ('{"messages": 3}', (), ":1"),
        ("", (), "no prompts"),
        ('{"prompt": "x"}', ("--drafter", "no-such"), "no-such"),
        ('{"prompt": "x"}', ("--drafter", "medusa"), "--medusa"),
        ('{"prompt": "x"}', ("--draft", "/nowhere"), "/nowhere"),
        ('{"prompt": "x"}', ("--builder", "bush"), "bush"),
    ],
)
def test_the_spec_bench_names_what_is_wrong(
    tmp_path: Path, line: str, flags: tuple[str, ...], named: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(line)
    done = paceline("bench", "spec", "--prompts", str(prompts), "--model", str(DEMO), *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("paceline bench spec: ") and named in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [(("--model", "/nowhere"), "/nowhere"), (("--dtype", "f7"), "f7")],
)
def test_what_cannot_be_measured_is_named(flags: tuple[str, ...], named: str) -> None:
    done = paceline("bench", "engine", "--model", str(DEMO), *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("paceline bench engine: ") and named in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_installation_without_an_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match="not installed"):
        child.run_bench("engine", BenchOptions(model=str(DEMO)))


def test_options_survive_the_way_to_the_process() -> None:
    options = BenchOptions(model=str(Path("x")), dtype="bf16", seed=3, batch_invariant=True)
    assert BenchOptions.from_json(options.to_json()) == options


def test_the_training_bench_records_a_stream_and_learns_from_it(tmp_path: Path) -> None:
    prompts, stream = tmp_path / "prompts.jsonl", tmp_path / "stream"
    lines = [{"prompt": f"How many are {i} and {i + 2}?", "domain": "math"} for i in range(6)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    flags = ("bench", "training", "--model", str(DEMO), "--threads", "1", "--json")
    recorded = paceline(
        *flags, "--record", str(stream), "--prompts", str(prompts), "--max-tokens", "12"
    )
    assert recorded.returncode == 0, recorded.stderr
    (line,) = recorded.stdout.splitlines()
    assert json.loads(line)["samples"] == 6
    learned = paceline(*flags, "--stream", str(stream), "--losses", "lk,forward-kl")
    assert learned.returncode == 0, learned.stderr
    (line,) = learned.stdout.splitlines()
    report = json.loads(line)
    assert len(report["ways"]) == 6 and report["samples"] == 6
    assert report["best"] in {way["name"] for way in report["ways"]}
    neither = paceline(*flags)
    assert neither.returncode != 0 and "--stream" in neither.stderr
