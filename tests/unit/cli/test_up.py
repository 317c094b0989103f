"""What `paceline up` checks before it starts, and when it calls a platform ready."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paceline.cli.app import app
from paceline.cli.errors import CommandError
from paceline.cli.ports import free_port, require_free
from paceline.cli.readiness import raise_if_failing, unready
from paceline.cli.ready_file import write_ready_file
from paceline.cli.supervisor import Supervisor
from paceline.cli.up import find_draft, find_learned, find_model
from paceline.domain.member import Member, Role
from tests.checkpoints import DEMO
from tests.unit.cli.conftest import python_child
from tests.waiting import until


def member(
    id_: str, role: Role, pid: int, *, node_id: str = "", is_draining: bool = False
) -> Member:
    address, version = "127.0.0.1:1", "0.1.0"
    return Member(id_, role, address, pid, version, node_id=node_id, is_draining=is_draining)


@pytest.mark.parametrize(
    ("members", "missing"),
    [
        ([], {"kv-0", "decode-0", "gateway-0"}),
        ([member("kv-0", Role.KVSTORE, 1)], {"decode-0", "gateway-0"}),
        (
            [
                member("kv-0", Role.KVSTORE, 1),
                member("decode-0", Role.DECODE, 2),
                member("gateway-0", Role.GATEWAY, 3),
            ],
            {"decode-0"},
        ),
        (
            [
                member("kv-0", Role.KVSTORE, 1),
                member("decode-0", Role.DECODE, 2, node_id="kv-0"),
                member("gateway-0", Role.GATEWAY, 99),
                member("stranger", Role.DECODE, 7),
            ],
            {"gateway-0"},
        ),
        (
            [
                member("kv-0", Role.KVSTORE, 1),
                member("decode-0", Role.DECODE, 2, node_id="kv-0", is_draining=True),
                member("gateway-0", Role.GATEWAY, 3),
            ],
            {"decode-0"},
        ),
        (
            [
                member("kv-0", Role.KVSTORE, 1),
                member("decode-0", Role.DECODE, 2, node_id="kv-0"),
                member("gateway-0", Role.GATEWAY, 3),
            ],
            set(),
        ),
    ],
    ids=["empty", "partly", "not attached", "earlier process", "draining", "ready"],
)
def test_ready_means_registered_by_the_present_process_and_attached(
    members: list[Member], missing: set[str]
) -> None:
    assert unready({"kv-0": 1, "decode-0": 2, "gateway-0": 3}, members) == missing


async def test_a_start_is_given_up_when_a_child_keeps_crashing(supervisor: Supervisor) -> None:
    child = supervisor.start(
        python_child("decode-0", "print('no weights', flush=True); raise SystemExit(1)")
    )
    await until(lambda: child.num_crashes >= 1)
    raise_if_failing(supervisor)
    await until(lambda: child.num_crashes >= 3)
    await child.stop()
    with pytest.raises(CommandError, match=r"(?s)decode-0 does not start.*exit code 1.*no weights"):
        raise_if_failing(supervisor)


async def test_a_start_is_given_up_at_once_when_settings_are_refused(
    supervisor: Supervisor,
) -> None:
    child = supervisor.start(python_child("kv-0", "print('bad flag'); raise SystemExit(2)"))
    await until(lambda: child.num_crashes >= 1)
    await child.stop()
    with pytest.raises(CommandError, match=r"(?s)kv-0 does not start.*bad flag"):
        raise_if_failing(supervisor)


def test_the_ready_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    path.write_text("old")
    write_ready_file(
        path,
        {
            "grpc": "127.0.0.1:50051",
            "http": "127.0.0.1:8080",
            "redis": "redis://127.0.0.1:6379/0",
        },
        {"gateway": [1], "prefill": [2, 3], "decode": [4], "kvstore": [5], "redis": [6]},
    )
    assert json.loads(path.read_text()) == {
        "grpc": "127.0.0.1:50051",
        "http": "127.0.0.1:8080",
        "redis": "redis://127.0.0.1:6379/0",
        "processes": {
            "gateway": [1],
            "prefill": [2, 3],
            "decode": [4],
            "kvstore": [5],
            "trainer": [],
            "autoscaler": [],
            "prometheus": [],
            "redis": [6],
        },
    }
    assert path.stat().st_mode & 0o077 == 0
    assert os.listdir(tmp_path) == ["ready.json"]


def test_the_demo_model_is_the_default() -> None:
    assert find_model(None) == DEMO
    assert find_model(DEMO) == DEMO


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"holds no config\.json"):
        find_model(tmp_path)


def test_a_draft_is_a_checkpoint_or_none(tmp_path: Path) -> None:
    assert [find_draft(draft) for draft in (None, "none", str(DEMO))] == [None, "none", str(DEMO)]
    with pytest.raises(CommandError, match=r"--draft: .* holds no config\.json"):
        find_draft(str(tmp_path))


def test_what_learns_is_a_model_or_heads() -> None:
    assert [find_learned(name) for name in (None, "model", "medusa")] == [None, "model", "medusa"]
    with pytest.raises(CommandError, match="--learn: 'eagle' is neither model nor medusa"):
        find_learned("eagle")


def test_a_free_port_is_accepted_and_so_is_any_port() -> None:
    require_free("127.0.0.1", free_port(), "--grpc-port")
    require_free("127.0.0.1", 0, "--grpc-port")


@pytest.mark.parametrize("flag", ["--grpc-port", "--http-port"])
def test_up_names_a_taken_port_and_starts_nothing(tmp_path: Path, flag: str) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        command = [sys.executable, "-m", "paceline.cli", "up", "--model", str(DEMO)]
        command += ["--grpc-port", "0", "--http-port", "0", flag, str(port)]
        command += ["--log-dir", str(tmp_path / "logs")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert f"port {port} is taken" in done.stderr
    assert flag in done.stderr
    assert not (tmp_path / "logs").exists()


def test_up_names_a_redis_that_does_not_answer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "paceline.cli", "up", "--model", str(DEMO)]
    command += ["--grpc-port", "0", "--http-port", "0", "--ready-file", str(tmp_path / "ready")]
    command += ["--redis-url", f"redis://127.0.0.1:{free_port()}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "no Redis answers" in done.stderr
    assert "child-started" not in done.stderr


def test_a_trainer_needs_a_draft(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "paceline.cli", "up", "--model", str(DEMO)]
    command += ["--draft", "none", "--log-dir", str(tmp_path / "logs")]
    for flags, why in (
        (["--trainer"], "--trainer: there is no draft"),
        (["--learn", "medusa"], "--learn medusa: there is no trainer"),
    ):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert why in done.stderr
        assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--min-decode 2", "do nothing without --autoscale"),
        ("--decode 0", "nobody would start a decode worker"),
        ("--autoscale --min-decode 3 --max-decode 2", "--min-decode 3 is over --max-decode 2"),
        ("--autoscale --max-prefill 9 --max-workers 4", "--max-prefill 9: --max-workers allows 4"),
        ("--decode 5 --max-workers 4", "--decode 5: --max-workers allows 4"),
    ],
)
def test_up_says_which_flags_do_not_go_together(tmp_path: Path, flags: str, why: str) -> None:
    result = CliRunner().invoke(app, ["up", "--model", str(DEMO), *flags.split()])
    assert result.exit_code == 1
    assert why in result.stderr


def test_up_without_a_prometheus_says_how_to_get_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "paceline.cli", "up", "--model", str(DEMO), "--autoscale"]
    command += ["--grpc-port", "0", "--http-port", "0", "--redis-url", "redis://127.0.0.1:1"]
    env = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 1
    assert "no Prometheus found: install it" in done.stderr


def test_the_command_line_needs_no_torch() -> None:
    code = "import sys, paceline.cli.app; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0
