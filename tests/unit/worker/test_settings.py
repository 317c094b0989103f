"""What the flags of a worker mean for its engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.engine.options import EngineOptions
from paceline.worker.settings import WorkerSettings


def options(*flags: str, model: Path | str = "m") -> EngineOptions:
    return WorkerSettings.load(["--model", str(model), *flags]).engine_options()


def test_defaults_are_those_of_the_engine() -> None:
    assert options("--role", "decode") == EngineOptions(model="m", capture_share=0.008)


def test_flags_reach_the_engine_and_its_process() -> None:
    flags = "--drafters trie,medusa --draft d --medusa h --draft-nodes 7 --draft-depth 3"
    flags += " --draft-builder rsd-s --verifier rejection"
    flags += " --capture-share 0.25 --capture-top 8 --capture-hidden --min-step-s 0.02"
    wanted = EngineOptions(
        model="m",
        drafters=("trie", "medusa"),
        draft="d",
        medusa="h",
        draft_nodes=7,
        draft_depth=3,
        draft_builder="rsd-s",
        verifier="rejection",
        capture_share=0.25,
        capture_top=8,
        capture_hidden=True,
        min_step_s=0.02,
    )
    assert options(*flags.split()) == wanted
    assert EngineOptions.from_json(wanted.to_json()) == wanted


def test_prefill_workers_never_draft() -> None:
    made = options("--role", "prefill", "--draft", "d", "--medusa", "h", "--drafters", "model")
    assert (made.drafters, made.draft, made.medusa) == ((), None, None)


@pytest.mark.parametrize("text", ["none", "", " , "])
def test_without_drafters_no_weights_are_loaded(text: str) -> None:
    made = options("--drafters", text, "--draft", "d", "--medusa", "h")
    assert (made.drafters, made.draft, made.medusa) == ((), None, None)


def test_names_count_once_and_spaces_do_not() -> None:
    assert options("--drafters", " trie, model,trie").drafters == ("trie", "model")


def test_the_draft_beside_the_model_is_the_default(tmp_path: Path) -> None:
    assert options(model=tmp_path).draft is None
    (tmp_path / "draft").mkdir()
    assert options(model=tmp_path).draft == str(tmp_path / "draft")
    assert options("--draft", "none", model=tmp_path).draft is None
    assert options("--draft", "other", model=tmp_path).draft == "other"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--draft-nodes", "0"),
        ("--draft-depth", "65"),
        ("--draft-builder", "fancy"),
        ("--verifier", "none"),
    ],
)
def test_what_is_out_of_range_is_refused(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        options(flag, value)
    assert exited.value.code == 2
    assert flag.removeprefix("--").replace("-", "_") in capsys.readouterr().err


def test_prefill_workers_never_capture() -> None:
    assert options("--role", "prefill", "--capture-share", "0.2").capture_share == 0.0
