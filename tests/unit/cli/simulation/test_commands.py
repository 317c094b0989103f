"""`paceline simulate` and `paceline bench autoscale`, as people call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline.cli.app import app

AUTOSCALE_KEYS = {
    "policy",
    "slo_attainment",
    "replica_seconds",
    "ttft_p99_s",
    "itl_p99_s",
    "scale_events",
    "max_replicas",
    "trace",
    "replica",
    "slo_ttft_s",
    "slo_itl_s",
    "start_up_s",
    "requests",
    "failed",
    "mean_prefill",
    "mean_decode",
    "targets",
    "sizes",
}


@pytest.fixture
def trace(tmp_path: Path) -> str:
    lines = [
        json.dumps({"at_s": 0.4 * i, "prompt_tokens": 3000, "output_tokens": 40})
        for i in range(100)
    ]
    path = tmp_path / "load.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def call(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args))
    return result.exit_code, result.stdout, result.stderr


def last_json(out: str) -> dict[str, Any]:
    return dict(json.loads(out.splitlines()[-1]))


FIXED = ("--policy", "static", "--prefill", "2", "--decode", "1")


def test_simulate_prints_a_report_for_people(trace: str) -> None:
    code, out, err = call("simulate", "--trace", trace, *FIXED, "--explain")
    assert code == 0, err
    assert "100 requests" in out
    assert "attained" in out
    assert "prefill 2.00 and decode 1.00 on average" in out
    assert "steady   prefill 2, decode 1" in out


def test_simulate_prints_nothing_but_json_when_asked(trace: str) -> None:
    code, out, err = call("simulate", "--trace", trace, *FIXED, "--json")
    assert code == 0, err
    assert len(out.splitlines()) == 1
    found = last_json(out)
    assert found.keys() >= AUTOSCALE_KEYS
    assert (found["policy"], found["requests"], found["failed"]) == ("static", 100, 0)
    assert found["sizes"] == {"prefill": 2, "decode": 1}
    assert found["trace"] == "load.jsonl"


def test_what_if_makes_one_run_for_each_value(trace: str) -> None:
    code, out, err = call("simulate", "--trace", trace, *FIXED, "--slo-ttft", "0.01,0.6,5")
    assert code == 0, err
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [
        ["--slo-ttft", "0.01"],
        ["--slo-ttft", "0.6"],
        ["--slo-ttft", "5"],
    ]
    _, out, _ = call("simulate", "--trace", trace, *FIXED, "--slo-ttft", "0.01,5", "--json")
    found = last_json(out)
    assert found["switch"] == "slo_ttft"
    assert [run["slo_attainment"] for run in found["runs"]] == [0.0, 1.0]


def test_drafts_and_their_training_shorten_itl(trace: str) -> None:
    args = ("simulate", "--trace", trace, *FIXED, "--json")
    plain = last_json(call(*args)[1])
    runs = last_json(call(*args, "--acceptance", "0.5", "--training", "off,on")[1])["runs"]
    itl = [plain["itl_p50_s"], *(run["itl_p50_s"] for run in runs)]
    assert itl == sorted(itl, reverse=True)
    assert itl[1] < 0.7 * itl[0]
    emitted = last_json(call(*args, "--emitted-per-step", "1.9375")[1])
    assert emitted["itl_p50_s"] == pytest.approx(itl[1])


def test_more_load_is_slower(trace: str) -> None:
    _, out, _ = call("simulate", "--trace", trace, *FIXED, "--load", "0.5,1,4", "--json")
    runs = last_json(out)["runs"]
    assert 35 < runs[0]["requests"] < 65
    assert [run["requests"] for run in runs[1:]] == [100, 400]
    assert runs[2]["ttft_p95_s"] > 2 * runs[0]["ttft_p95_s"]


def test_autoscale_finds_the_smallest_fixed_fleet(trace: str) -> None:
    args = ("bench", "autoscale", "--trace", trace, "--policy", "static", "--json")
    limits = ("--slo-ttft", "1.5", "--load", "3", "--max-prefill", "6", "--max-decode", "3")
    code, out, err = call(*args, *limits)
    assert code == 0, err
    found = last_json(out)
    assert found.keys() >= AUTOSCALE_KEYS
    assert len(out.splitlines()) == 1
    assert found["slo_attainment"] >= 0.99 * found["reachable_ratio"]
    prefill, decode = found["sizes"]["prefill"], found["sizes"]["decode"]
    assert 2 < prefill + decode < 9
    assert found["max_replicas"] == prefill + decode
    # The trials are told on stderr, the final run last.
    assert err.splitlines()[-1].startswith(f"static {prefill}+{decode}")
    total = prefill + decode - 1
    for fewer in range(1, total):
        smaller = ("--prefill", str(fewer), "--decode", str(total - fewer))
        attained = last_json(call(*args, *limits, *smaller)[1])["slo_attainment"]
        assert attained < 0.99 * found["reachable_ratio"]


def test_plots_are_drawn(trace: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for command in (("simulate",), ("bench", "autoscale")):
        path = tmp_path / f"{command[-1]}.png"
        code, _, err = call(*command, "--trace", trace, *FIXED, "--plot", str(path))
        assert code == 0, err
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--policy", "guess"), "--policy guess"),
        (("--slo-ttft", "1,2", "--load", "1,2"), "one at a time"),
        (("--slo-ttft", "soon"), "--slo-ttft 'soon'"),
        (("--slo-itl", "-1"), "--slo-itl -1"),
        (("--load", "0"), "--load 0"),
        (("--training", "maybe"), "--training maybe"),
        (("--acceptance", "1.5"), "--acceptance 1.5"),
        (("--emitted-per-step", "9"), "--emitted-per-step"),
        (("--blackout", "noon"), "--blackout noon"),
        (("--target", "1,2,3"), "--target 1,2,3"),
        (("--min-decode", "9", "--max-decode", "3"), "--min-decode 9"),
        (("--replica", "huge"), "--replica huge"),
        (("--plot", "/nowhere/at/all.png"), "no directory"),
    ],
)
def test_flags_that_make_no_sense_are_refused_by_name(
    trace: str, args: tuple[str, ...], said: str
) -> None:
    code, out, err = call("simulate", "--trace", trace, *FIXED, *args)
    assert code == 1
    assert said in err
    assert out == ""


def test_a_wrong_trace_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"at_s": 0, "prompt_tokens": 5, "output_tokens": "many"}')
    for command in (("simulate",), ("bench", "autoscale")):
        code, _, err = call(*command, "--trace", str(path), *FIXED)
        assert code == 1
        assert "bad.jsonl:1: output_tokens 'many'" in err


def test_static_needs_a_size_in_simulate(trace: str) -> None:
    code, _, err = call("simulate", "--trace", trace, "--policy", "static")
    assert code == 1
    assert "--prefill and --decode" in err
