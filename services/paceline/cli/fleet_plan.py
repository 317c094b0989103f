"""Which processes a platform on this machine has, with which flags. Pure values.

Only what the user set becomes a flag: everything else is left to each service's own
defaults and its PACELINE_* environment variables.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from paceline.cli.child import ChildSpec
from paceline.domain.drafts import MEDUSA_DRAFTER, MODEL_DRAFTER
from paceline.process.lifecycle import EXIT_WITH_PARENT_VAR

GATEWAY_ID = "gateway-0"
TRAINER_ID = "trainer-0"
KILL_MARGIN_S = 5.0
"""Time beyond the drain grace that a service gets to close what it holds."""

WORKER_DRAIN_GRACE_S = 25.0
"""Default of gateway and workers."""
NODE_DRAIN_GRACE_S = 5.0
"""Default of KV nodes."""
TRAINER_DRAIN_GRACE_S = 5.0
"""Default of the trainer."""

_THREAD_VARS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class PlatformOptions:
    """What the user asked of `paceline up`; None leaves a setting to the services."""

    model: Path
    num_prefill: int = 1
    num_decode: int = 1
    num_kv_nodes: int = 1
    host: str = "127.0.0.1"
    grpc_port: int = 50051
    http_port: int = 8080
    redis_url: str | None = None
    """Redis to use; None starts a private one."""
    fleet: str | None = None
    served_model_name: str | None = None
    api_keys: Path | None = None
    dtype: str | None = None
    chunk_tokens: int | None = None
    block_size: int | None = None
    num_kv_blocks: int | None = None
    kv_memory_mb: int | None = None
    max_num_seqs: int | None = None
    threads: int | None = None
    draft: str | None = None
    drafters: str | None = None
    verifier: str | None = None
    deepen: int | None = None
    has_trainer: bool | None = None
    """Whether there is a trainer; None has one if there is a draft for it to look after."""
    draft_registry: Path | None = None
    learn: str | None = None
    """What the trainer's learner trains: model or medusa."""
    arena_mb: int | None = None
    kv_transport: str | None = None
    log_level: str | None = None
    drain_grace_s: float | None = None


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """The children of one platform, apart from Redis, in the order of their start."""

    kv_nodes: tuple[ChildSpec, ...]
    workers: tuple[ChildSpec, ...]
    trainers: tuple[ChildSpec, ...]
    gateway: ChildSpec

    @property
    def specs(self) -> tuple[ChildSpec, ...]:
        """All of them."""
        return (*self.kv_nodes, *self.workers, *self.trainers, self.gateway)


def plan_fleet(
    options: PlatformOptions, fleet: str, redis_url: str, environ: Mapping[str, str]
) -> FleetPlan:
    """Return the processes to start."""
    # By environment, since a URL may hold a password and command lines are public.
    own = {EXIT_WITH_PARENT_VAR: "1", "PACELINE_REDIS_URL": redis_url}
    # gRPC's core writes plain lines between our JSON ones unless told not to.
    base = {"GRPC_VERBOSITY": "NONE", **environ, **own}
    env = with_threads(base, 1)
    shared: dict[str, object] = {
        "fleet": fleet,
        "log-level": options.log_level,
        "drain-grace-s": options.drain_grace_s,
    }
    node_flags = {**shared, "arena-mb": options.arena_mb, "transport": options.kv_transport}
    nodes = tuple(
        ChildSpec(
            node_id(i),
            "kvstore",
            _command("paceline.kvstore", {"member-id": node_id(i), **node_flags}),
            env,
            _grace_s(options, NODE_DRAIN_GRACE_S),
        )
        for i in range(options.num_kv_nodes)
    )
    grace_s = _grace_s(options, WORKER_DRAIN_GRACE_S)
    served = {"model": options.model, "served-model-name": options.served_model_name}
    gateway_flags = {
        "member-id": GATEWAY_ID,
        "grpc-port": options.grpc_port,
        "http-port": options.http_port,
        "api-keys": options.api_keys,
    }
    gateway_argv = _command("paceline.gateway", {**gateway_flags, **served, **shared})
    gateway = ChildSpec(GATEWAY_ID, "gateway", gateway_argv, env, grace_s)
    worker_env = with_threads(base, options.threads or 1)
    worker_flags = {
        **served,
        **shared,
        "dtype": options.dtype,
        "chunk-tokens": options.chunk_tokens,
        "block-size": options.block_size,
        "num-kv-blocks": options.num_kv_blocks,
        "kv-memory-mb": options.kv_memory_mb,
        "max-num-seqs": options.max_num_seqs,
        "threads": options.threads,
        "draft": options.draft,
        "drafters": options.drafters,
        "verifier": options.verifier,
        "deepen": options.deepen,
        "capture-hidden": options.learn == MEDUSA_DRAFTER or None,
    }
    workers = tuple(
        ChildSpec(
            f"{role}-{i}",
            role,
            _command(
                "paceline.worker",
                {"member-id": f"{role}-{i}", "role": role, "kv-node": node, **worker_flags},
            ),
            worker_env,
            grace_s,
        )
        for role, i, node in place_workers(options)
    )
    trainer_flags = {
        "member-id": TRAINER_ID,
        "model": options.model,
        "draft": options.draft,
        "draft-registry": options.draft_registry,
        "learn": options.learn,
        **shared,
    }
    trainer = ChildSpec(
        TRAINER_ID,
        "trainer",
        _command("paceline.trainer", trainer_flags),
        env,
        _grace_s(options, TRAINER_DRAIN_GRACE_S),
    )
    wants_trainer = has_draft(options) if options.has_trainer is None else options.has_trainer
    return FleetPlan(nodes, workers, (trainer,) if wants_trainer else (), gateway)


def has_draft(options: PlatformOptions) -> bool:
    """Whether workers will draft with a small model, so that there is one to improve."""
    drafters = options.drafters
    if options.draft == "none" or (
        drafters is not None and MODEL_DRAFTER not in drafters.split(",")
    ):
        return False
    return bool(options.draft) or (options.model / "draft" / "config.json").is_file()


def place_workers(options: PlatformOptions) -> list[tuple[str, int, str]]:
    """Return (role, index, KV node) of every worker.

    With several nodes the two roles never share one, so that KV really travels.
    """
    nodes = [node_id(i) for i in range(options.num_kv_nodes)]
    half = max(1, len(nodes) // 2)
    prefill_nodes, decode_nodes = nodes[:half], nodes[half:] or nodes
    return [
        *(("prefill", i, prefill_nodes[i % half]) for i in range(options.num_prefill)),
        *(("decode", i, decode_nodes[i % len(decode_nodes)]) for i in range(options.num_decode)),
    ]


def node_id(index: int) -> str:
    """Return the member id of a KV node."""
    return f"kv-{index}"


def with_ports(gateway: ChildSpec, grpc_port: int, http_port: int) -> ChildSpec:
    """Return the gateway on fixed ports, for its next start."""
    # The last flag of a name wins.
    ports = ("--grpc-port", str(grpc_port), "--http-port", str(http_port))
    return replace(gateway, argv=gateway.argv + ports)


def with_threads(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """Return an environment in which numeric libraries use that many threads."""
    return {**environ, **dict.fromkeys(_THREAD_VARS, str(threads))}


def _grace_s(options: PlatformOptions, default_s: float) -> float:
    drain_grace_s = default_s if options.drain_grace_s is None else options.drain_grace_s
    return drain_grace_s + KILL_MARGIN_S


def _command(module: str, flags: Mapping[str, object]) -> tuple[str, ...]:
    argv = [sys.executable, "-m", module]
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not None:
            argv += [f"--{name}", str(value)]
    return tuple(argv)
