"""What `paceline bench online` makes of its requests, and the files it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.cli.bench.replay import Arm, Asked, ReplayOptions, replay
from paceline.cli.bench.replay_report import (
    figures,
    forgetting,
    make_report,
    requests_to_recover,
)
from paceline.cli.errors import CommandError


def asked(phase: int, accepted: float, *, tried: float = 10.0, version: str = "v") -> Asked:
    return Asked(
        phase=phase,
        num_tokens=5,
        target_steps=2,
        ttft_s=0.5,
        decode_s=0.4,
        gaps_s=(0.05, 0.05, 0.1, 0.2),
        tried=tried,
        accepted=accepted,
        draft_version=version,
        token_ids=(1, 2, 3, 4, 5),
    )


def test_a_phase_has_rates_of_its_decoding() -> None:
    rows = [asked(0, 6.0), asked(0, 9.0, tried=20.0)]
    assert figures(rows) == {
        "acceptance": 0.5,
        "emitted_per_step": 2.5,
        "tok_s": 10.0,
        "itl_p95_s": 0.2,
        "ttft_p95_s": 0.5,
        "acceptance_end": 0.45,
        "tok_s_end": 10.0,
    }
    assert figures([])["tok_s"] == 0.0


def test_recovery_counts_requests_of_the_second_phase() -> None:
    rows = [asked(0, 8.0) for _ in range(40)]
    rows += [asked(1, 2.0) for _ in range(60)] + [asked(1, 8.0) for _ in range(60)]
    found = requests_to_recover(rows, [0, 1])
    # The moving mean over 20 requests is 0.95 of 0.8 once 19 of them are good.
    assert found == 60 + 19
    assert requests_to_recover(rows[:40], [0]) is None


def test_forgetting_is_told_where_the_first_traffic_comes_back() -> None:
    rows = [asked(0, 8.0), asked(1, 3.0), asked(2, 7.0)]
    assert forgetting(rows, ["a", "b", "a"]) == 0.1
    assert forgetting(rows, ["a", "b", "c"]) is None
    assert forgetting(rows[:1], ["a"]) is None


def test_the_report_has_all_arms_and_compares_outputs() -> None:
    arms = {name: Arm([asked(0, 5.0), asked(1, 5.0)]) for name in ("off", "frozen", "online")}
    report = make_report(arms, {"phases": ["a", "b"]}).to_json()
    assert {"off", "frozen", "online", "requests_to_recover", "swaps", "max_swap_stall_s"} <= set(
        report
    )
    assert [len(report[name]) for name in arms] == [2, 2, 2]
    assert report["identical_to_off"] is True
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no prompts"),
        ("{}\n", ":1: not a prompt"),
        ('{"prompt": "a"}\n[]\n', ":2: not a prompt"),
        ("x\n", ":1: not a prompt"),
    ],
)
async def test_a_file_that_is_none_is_named(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "phase.jsonl"
    path.write_text(content)
    options = ReplayOptions(
        model=tmp_path,
        draft=None,
        phases=(path,),
        requests=4,
        max_tokens=4,
        concurrency=1,
        busy=0.5,
        temperature=0.0,
        drafter="model",
        threads=1,
        deepen=0,
    )
    with pytest.raises(CommandError, match=named):
        await replay(options, "off", tmp_path, lambda text: None)
