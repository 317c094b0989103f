"""`paceline draft create`: from a target to a draft that guesses, in seconds."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from paceline.cli import draft
from paceline.cli.errors import CommandError
from paceline.engine.build import build_engine
from paceline.engine.options import EngineOptions
from paceline.engine.weights import model_digest
from paceline.trainer.checkpoint import CARD
from paceline.trainer.create import create_draft
from paceline.trainer.options import CreateOptions

SMALL = ("--threads", "1", "--context", "64", "--concurrency", "8", "--dtype", "f32")


def command(target: Path, out: Path, *flags: str) -> list[str]:
    places = ("--target", str(target), "--out", str(out))
    return [sys.executable, "-m", "paceline.cli", "draft", "create", *places, *SMALL, *flags]


def create(target: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(target, out, *flags), capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def made(target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("made") / "draft"
    done = create(target, out, "--minutes", "0.03", "--seed", "3", "--hidden", "64")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def create_by_ticks(target: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Make a draft against a clock that a look at it moves on, so that load changes nothing."""
    values = dict(target=str(target), out=str(out), minutes=0.1, seed=3, dtype="f32")
    sizes = dict(concurrency=8, context_tokens=64, batch_tokens=512, hidden_size=64)
    options = CreateOptions(**{**values, **sizes, "opening": (20, 21), "bridge": (30,), **changes})
    ticks = itertools.count()
    return create_draft(options, lambda line: None, lambda: 0.01 * next(ticks))


def test_the_draft_has_learned(target: Path, tmp_path: Path) -> None:
    card = create_by_ticks(target, tmp_path / "draft")
    before, after = card["held_out_untrained"], card["held_out"]
    assert before["positions"] == after["positions"] > 300
    assert after["greedy_agreement"] > before["greedy_agreement"] + 0.1
    assert after["overlap"] > before["overlap"] + 0.2


def test_the_same_seed_and_steps_make_the_same_draft(target: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        create_by_ticks(target, tmp_path / name, minutes=0.02, seed=seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_the_card_says_how_it_was_made(made: tuple[Path, str], target: Path) -> None:
    out, printed = made
    card = json.loads((out / CARD).read_text())
    assert card == json.loads(printed.splitlines()[-1])
    assert card["target_digest"] == model_digest(target)
    assert (card["seed"], card["minutes"], card["threads"]) == (3, 0.03, 1)
    assert card["tokens_trained"] > 0 and card["tokens_written"] > 0 and card["num_steps"] > 0
    assert "draft create" in card["command"] and "--minutes 0.03" in card["command"]
    assert "greedy agreement" in printed.splitlines()[1]


def test_the_draft_loads_anywhere(made: tuple[Path, str]) -> None:
    out, _ = made
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (
        sum(p.numel() for p in model.parameters())
        == json.loads((out / CARD).read_text())["num_parameters"]
    )
    _, card = build_engine(EngineOptions(model=str(out), num_kv_blocks=16))
    assert card.config.vocab_size == model.config.vocab_size
    assert {oct(path.stat().st_mode)[-3:] for path in out.iterdir()} == {"644"}


def test_prompts_are_read_in_both_forms(target: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "the a"},
        {"messages": [{"role": "user", "content": "the"}]},
        {"prompt": "b"},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    done = create(target, tmp_path / "draft", "--minutes", "0.005", "--prompts", str(prompts))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "draft" / CARD).exists()


def test_a_target_without_template_writes_documents(target: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(target, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    done = create(plain, tmp_path / "draft", "--minutes", "0.005")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--minutes", "0"), "minutes"),
        (("--minutes", "nan"), "minutes"),
        (("--minutes", "1", "--dtype", "f7"), "f7"),
        (("--minutes", "1", "--hidden", "5"), "hidden"),
        (("--minutes", "1", "--prompts", "/nowhere"), "/nowhere"),
        (("--minutes", "1", "--target", "/nowhere"), "/nowhere"),
        (("--minutes", "1", "--out", "/nowhere/draft"), "/nowhere"),
        (("--minutes", "1", "--out", "/dev"), "not empty"),
    ],
)
def test_what_cannot_be_made_is_named(
    target: Path, tmp_path: Path, flags: tuple[str, ...], named: str
) -> None:
    done = create(target, tmp_path / "draft", *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("paceline draft create: ") and named in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_do_not_fit_are_named(target: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "b" * 70}))
    done = create(target, tmp_path / "draft", "--minutes", "1", "--prompts", str(prompts))
    assert done.returncode == 1 and "64 tokens" in done.stderr
    prompts.write_text('{"prompt": "b"}\n{"text": "b"}')
    done = create(target, tmp_path / "draft", "--minutes", "1", "--prompts", str(prompts))
    assert done.returncode == 1 and "line 2" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing(
    target: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        command(target, tmp_path / "draft", "--minutes", "5"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "weights" in process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert errors.count("nothing was saved") == 1 and "Traceback" not in errors
    deadline_s = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < deadline_s, "the process at work outlives its command"
        time.sleep(0.02)
    assert list(tmp_path.iterdir()) == []


def test_an_installation_without_a_trainer_says_so(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match="not installed"):
        draft._run(CreateOptions(str(target), "x", 1.0))


def test_options_survive_the_way_to_the_process() -> None:
    options = CreateOptions("a", "b", 0.5, prompts=((1, 2), (3,)), opening=(4,), bridge=(5, 6))
    assert CreateOptions.from_json(options.to_json()) == options
