"""Which processes a platform has, with which flags."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from paceline.cli.child import ChildSpec
from paceline.cli.fleet_plan import FleetPlan, FleetPlanner, with_ports, worker_node
from paceline.cli.platform_options import AutoscaleOptions, PlatformOptions
from paceline.gateway.settings import GatewaySettings
from paceline.kvstore.settings import KvNodeSettings
from paceline.process.settings import ServiceSettings
from paceline.trainer.settings import TrainerSettings
from paceline.worker.settings import WorkerSettings
from tests.checkpoints import DEMO

OPTIONS = PlatformOptions(model=Path("/models/demo"))
URL = "redis://:secret@127.0.0.1:6379/0"


def plan(options: PlatformOptions) -> FleetPlan:
    return planner(options).plan()


def planner(options: PlatformOptions) -> FleetPlanner:
    return FleetPlanner(options, "test", URL, {"PATH": "/bin", "OMP_NUM_THREADS": "64"})


def settings_of(spec: ChildSpec, kind: type[ServiceSettings]) -> ServiceSettings:
    """Let the service itself read the flags."""
    return kind.load(list(spec.argv[3:]))


@pytest.mark.parametrize(
    ("num_kv_nodes", "num_prefill", "num_decode", "nodes"),
    [
        (1, 1, 1, "p0 d0"),
        (1, 2, 2, "p0 p0 d0 d0"),
        (2, 1, 1, "p0 d1"),
        (2, 2, 3, "p0 p0 d1 d1 d1"),
        (3, 2, 2, "p0 p0 d1 d2"),
        (4, 3, 3, "p0 p1 p0 d2 d3 d2"),
        (2, 0, 2, "d1 d1"),
    ],
)
def test_roles_share_a_node_only_if_there_is_one(
    num_kv_nodes: int, num_prefill: int, num_decode: int, nodes: str
) -> None:
    placed = [("p", worker_node(num_kv_nodes, "prefill", i)) for i in range(num_prefill)]
    placed += [("d", worker_node(num_kv_nodes, "decode", i)) for i in range(num_decode)]
    assert " ".join(f"{role}{node.removeprefix('kv-')}" for role, node in placed) == nodes


def test_names_and_roles() -> None:
    specs = plan(replace(OPTIONS, num_prefill=2, num_decode=1, num_kv_nodes=2)).specs
    assert [(spec.name, spec.role) for spec in specs] == [
        ("kv-0", "kvstore"),
        ("kv-1", "kvstore"),
        ("prefill-0", "prefill"),
        ("prefill-1", "prefill"),
        ("decode-0", "decode"),
        ("gateway-0", "gateway"),
    ]


def test_unset_options_are_left_to_the_services() -> None:
    fleet = plan(OPTIONS)
    flags = {flag for spec in fleet.specs for flag in spec.argv if flag.startswith("--")}
    assert flags == {
        *("--member-id", "--fleet", "--model", "--role", "--kv-node"),
        *("--grpc-port", "--http-port"),
    }


def test_set_options_reach_the_services() -> None:
    fleet = plan(
        replace(
            OPTIONS,
            grpc_port=0,
            served_model_name="tiny",
            api_keys=Path("/keys.json"),
            dtype="bf16",
            chunk_tokens=128,
            block_size=32,
            num_kv_blocks=99,
            kv_memory_mb=64,
            max_num_seqs=7,
            threads=2,
            draft="none",
            drafters="trie",
            verifier="rejection",
            arena_mb=33,
            kv_transport="grpc",
            log_level="DEBUG",
            drain_grace_s=0.0,
        )
    )
    worker = settings_of(fleet.workers[0], WorkerSettings)
    assert worker.model_dump(include={"role", "kv_node", "fleet", "log_level", "dtype"}) == {
        "role": "prefill",
        "kv_node": "kv-0",
        "fleet": "test",
        "log_level": "DEBUG",
        "dtype": "bf16",
    }
    assert worker.model_dump(include={"chunk_tokens", "block_size", "num_kv_blocks"}) == {
        "chunk_tokens": 128,
        "block_size": 32,
        "num_kv_blocks": 99,
    }
    assert worker.model_dump(include={"kv_memory_mb", "max_num_seqs", "threads"}) == {
        "kv_memory_mb": 64,
        "max_num_seqs": 7,
        "threads": 2,
    }
    decode = settings_of(fleet.workers[-1], WorkerSettings)
    assert decode.model_dump(include={"draft", "drafters", "verifier"}) == {
        "draft": "none",
        "drafters": "trie",
        "verifier": "rejection",
    }
    node = settings_of(fleet.kv_nodes[0], KvNodeSettings)
    assert node.model_dump(include={"arena_mb", "transport", "drain_grace_s"}) == {
        "arena_mb": 33,
        "transport": "grpc",
        "drain_grace_s": 0.0,
    }
    gateway = settings_of(fleet.gateway, GatewaySettings)
    assert gateway.model_dump(include={"grpc_port", "http_port", "served_model_name"}) == {
        "grpc_port": 0,
        "http_port": 8080,
        "served_model_name": "tiny",
    }
    assert gateway.model_dump(include={"api_keys"}) == {"api_keys": Path("/keys.json")}


def test_the_redis_password_is_on_no_command_line() -> None:
    for spec in plan(OPTIONS).specs:
        assert "secret" not in " ".join(spec.argv)
        assert spec.env["PACELINE_REDIS_URL"] == URL
        assert spec.env["PACELINE_EXIT_WITH_PARENT"] == "1"


def test_threads_are_bounded_whatever_the_environment_says() -> None:
    fleet = plan(replace(OPTIONS, threads=3))
    assert {spec.env["OMP_NUM_THREADS"] for spec in fleet.workers} == {"3"}
    assert fleet.gateway.env["OMP_NUM_THREADS"] == "1"
    assert plan(OPTIONS).workers[0].env["OMP_NUM_THREADS"] == "1"


def test_children_get_longer_to_end_than_their_requests() -> None:
    services: list[tuple[ChildSpec, type[ServiceSettings]]] = [
        (plan(OPTIONS).kv_nodes[0], KvNodeSettings),
        (plan(OPTIONS).workers[0], WorkerSettings),
        (plan(OPTIONS).gateway, GatewaySettings),
    ]
    for spec, kind in services:
        grace_s = settings_of(spec, kind).model_dump()["drain_grace_s"]
        assert spec.grace_s == grace_s + 5.0
    assert plan(replace(OPTIONS, drain_grace_s=0.0)).gateway.grace_s == 5.0


def test_a_restarted_gateway_keeps_its_ports() -> None:
    gateway = with_ports(plan(replace(OPTIONS, grpc_port=0, http_port=0)).gateway, 50123, 50124)
    settings = settings_of(gateway, GatewaySettings)
    assert settings.model_dump(include={"grpc_port", "http_port"}) == {
        "grpc_port": 50123,
        "http_port": 50124,
    }


@pytest.mark.parametrize(
    ("options", "has_trainer"),
    [
        (OPTIONS, False),
        (replace(OPTIONS, model=DEMO), True),
        (replace(OPTIONS, model=DEMO, drafters="trie,model"), True),
        (replace(OPTIONS, model=DEMO, drafters="trie,recycling"), False),
        (replace(OPTIONS, model=DEMO, draft="none"), False),
        (replace(OPTIONS, draft="/drafts/a"), True),
        (replace(OPTIONS, model=DEMO, has_trainer=False), False),
        (replace(OPTIONS, draft="/drafts/a", has_trainer=True), True),
    ],
)
def test_there_is_a_trainer_where_there_is_a_draft(
    options: PlatformOptions, has_trainer: bool
) -> None:
    roles = [spec.role for spec in plan(options).specs]
    assert ("trainer" in roles) == has_trainer
    assert roles.count("trainer") <= 1


def test_what_learns_decides_what_workers_capture(capsys: pytest.CaptureFixture[str]) -> None:
    for learn, has_hidden in ((None, False), ("model", False), ("medusa", True)):
        fleet = plan(replace(OPTIONS, draft="/drafts/a", learn=learn))
        (trainer,) = fleet.trainers
        assert settings_of(trainer, TrainerSettings).model_dump()["learn"] == (learn or "model")
        decode = settings_of(fleet.workers[-1], WorkerSettings)
        assert isinstance(decode, WorkerSettings)
        assert decode.engine_options().capture_hidden == has_hidden
        assert decode.engine_options().capture_share > 0
    with pytest.raises(SystemExit):
        TrainerSettings.load(["--model", "m", "--learn", "medusa", "--no-training"])
    assert "nothing learns without training" in capsys.readouterr().err


def test_the_trainer_gets_the_draft_and_one_thread() -> None:
    options = replace(OPTIONS, draft="/drafts/a", draft_registry=Path("/registry"), threads=4)
    (spec,) = plan(options).trainers
    settings = settings_of(spec, TrainerSettings)
    assert settings.model_dump(include={"model", "draft", "draft_registry", "member_id"}) == {
        "model": Path("/models/demo"),
        "draft": "/drafts/a",
        "draft_registry": Path("/registry"),
        "member_id": "trainer-0",
    }
    assert spec.env["OMP_NUM_THREADS"] == "1"
    assert spec.grace_s == settings.model_dump()["drain_grace_s"] + 5.0


def flags_of(spec: ChildSpec) -> dict[str, str]:
    return dict(zip(spec.argv[3::2], spec.argv[4::2], strict=True))


def test_a_further_worker_is_like_the_first_ones() -> None:
    options = replace(OPTIONS, num_decode=2, num_kv_nodes=4, threads=2, min_step_s=0.02)
    own = planner(options)
    assert own.worker("decode", 1) == own.plan().workers[-1]
    third = own.worker("decode", 2)
    assert (third.name, third.role) == ("decode-2", "decode")
    settings = settings_of(third, WorkerSettings)
    assert settings.model_dump(include={"member_id", "role", "kv_node", "min_step_s"}) == {
        "member_id": "decode-2",
        "role": "decode",
        "kv_node": "kv-2",
        "min_step_s": 0.02,
    }
    assert third.env == own.plan().workers[-1].env


def test_the_autoscaler_gets_what_the_user_set_and_bounds_that_hold_here() -> None:
    least = planner(replace(OPTIONS, autoscale=AutoscaleOptions())).autoscaler("c:1", "http://p")
    assert (least.name, least.role) == ("autoscaler-0", "autoscaler")
    assert flags_of(least) == {
        "--member-id": "autoscaler-0",
        "--fleet": "test",
        "--target": "local",
        "--control-address": "c:1",
        "--prefill-max": "16",
        "--decode-max": "16",
    }
    assert least.env["PACELINE_PROMETHEUS_URL"] == "http://p"
    scaling = AutoscaleOptions(
        min_prefill=0,
        max_prefill=2,
        min_decode=1,
        max_decode=3,
        slo_ttft_s=0.5,
        slo_itl_s=0.05,
        policy="predictive",
        scale_to_zero_s=60.0,
    )
    spec = planner(replace(OPTIONS, autoscale=scaling, log_level="DEBUG")).autoscaler("c:1", "")
    assert flags_of(spec) == {
        **flags_of(least),
        "--log-level": "DEBUG",
        "--prefill-min": "0",
        "--prefill-max": "2",
        "--decode-min": "1",
        "--decode-max": "3",
        "--slo-ttft-s": "0.5",
        "--slo-itl-s": "0.05",
        "--policy": "predictive",
        "--idle-s": "60.0",
    }


def test_the_pace_of_one_machine_yields_to_the_environment() -> None:
    options = replace(OPTIONS, autoscale=AutoscaleOptions())
    assert planner(options).autoscaler("", "").env["PACELINE_PERIOD_S"] == "1"
    own = FleetPlanner(options, "test", URL, {"PACELINE_PERIOD_S": "9"})
    assert own.autoscaler("", "").env["PACELINE_PERIOD_S"] == "9"


@pytest.mark.parametrize(
    ("options", "limit", "starts_prometheus"),
    [
        (OPTIONS, 16, False),
        (replace(OPTIONS, num_decode=20), 20, False),
        (replace(OPTIONS, max_workers=3), 3, False),
        (replace(OPTIONS, has_prometheus=True), 16, True),
        (replace(OPTIONS, autoscale=AutoscaleOptions()), 16, True),
        (replace(OPTIONS, autoscale=AutoscaleOptions(), prometheus_url="http://p"), 16, False),
    ],
)
def test_what_options_mean(options: PlatformOptions, limit: int, starts_prometheus: bool) -> None:
    assert (options.worker_limit, options.starts_prometheus) == (limit, starts_prometheus)
