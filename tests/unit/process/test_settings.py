"""Settings: who wins, what is refused and how it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from paceline import __version__
from paceline.process.settings import ServiceSettings


class Settings(ServiceSettings):
    """A service for tests."""

    threads: int = Field(default=1, ge=1)
    """Compute threads."""
    keep_arena: bool = False
    """Leaves the file."""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PACELINE_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["settings.toml", "settings.json"])
def test_flags_beat_environment_beats_file_beats_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    values = {"threads": 2, "fleet": "file", "member-id": "file"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    text = json.dumps(values) if name.endswith("json") else "\n".join(lines)
    file = tmp_path / name
    file.write_text(text)
    assert Settings.load([]).threads == 1
    settings = Settings.load(["--config", str(file)])
    assert (settings.threads, settings.member_id) == (2, "file")
    monkeypatch.setenv("PACELINE_THREADS", "3")
    monkeypatch.setenv("PACELINE_FLEET", "environment")
    settings = Settings.load([f"--config={file}"])
    assert (settings.threads, settings.fleet, settings.member_id) == (3, "environment", "file")
    settings = Settings.load(["--config", str(file), "--threads", "4"])
    assert (settings.threads, settings.fleet, settings.member_id) == (4, "environment", "file")


def test_flags_are_kebab_case_and_booleans_need_no_value() -> None:
    settings = Settings.load(["--keep-arena", "--member-id=x", "--log-level", "debug"])
    assert (settings.keep_arena, settings.member_id, settings.log_level) == (True, "x", "DEBUG")
    assert not Settings.load(["--no-keep-arena"]).keep_arena


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--thraeds", "2"], "--thraeds"),
        (["--thread", "2"], "--thread"),
        (["surplus"], "surplus"),
        (["--threads", "0"], "threads: Input should be greater than or equal to 1"),
        (["--threads", "many"], "threads:"),
        (["--log-level", "loud"], "log_level:"),
        (["--metrics-port", "70000"], "metrics_port:"),
        (["--config"], "--config"),
        (["--config", "/nowhere.toml"], "/nowhere.toml"),
    ],
)
def test_bad_flags_end_with_status_2_and_a_clear_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        Settings.load(argv)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert said in last
    assert "pydantic" not in last


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"thraeds": 2}', "thraeds: no such setting"),
        ("[1]", "not a table"),
        ("{", "bad.json: "),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        Settings.load(["--config", str(file)])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_misspelt_variables_are_refused_and_those_of_other_services_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PACELINE_GRPC_PORT", "50051")
    monkeypatch.setenv("PACELINE_EXIT_WITH_PARENT", "1")
    Settings.load([])
    monkeypatch.setenv("PACELINE_THRAEDS", "2")
    with pytest.raises(SystemExit) as end:
        Settings.load([])
    assert end.value.code == 2
    assert "PACELINE_THRAEDS: no setting; PACELINE_THREADS is one" in capsys.readouterr().err


@pytest.mark.parametrize("service", ["kvstore", "worker", "gateway"])
def test_services_tell_their_version(service: str) -> None:
    command = [sys.executable, "-m", f"paceline.{service}", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == f"paceline {__version__}\n"


def test_help_names_flags_variables_and_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        Settings.load(["--help"])
    assert not end.value.code
    usage = capsys.readouterr().out
    for text in ("A service for tests.", "--keep-arena", "Compute threads. (default: 1)"):
        assert text in usage
    assert all(text in usage for text in ("--version", "--config FILE", "PACELINE_LOG_LEVEL"))


def test_passwords_are_not_described() -> None:
    settings = Settings.load(["--redis-url", "redis://user:secret@host:6379/0"])
    assert settings.describe()["redis_url"] == "redis://***@host:6379/0"
