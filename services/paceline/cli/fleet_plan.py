"""Which processes a platform on this machine has, with which flags. Pure values.

Only what the user set becomes a flag: everything else is left to each service's own
defaults and its PACELINE_* environment variables.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from paceline.cli.child import ChildSpec
from paceline.cli.platform_options import PlatformOptions, has_draft
from paceline.domain.drafts import MEDUSA_DRAFTER
from paceline.process.lifecycle import EXIT_WITH_PARENT_VAR

GATEWAY_ID = "gateway-0"
TRAINER_ID = "trainer-0"
AUTOSCALER_ID = "autoscaler-0"
KILL_MARGIN_S = 5.0
"""Time beyond the drain grace that a service gets to close what it holds."""

WORKER_DRAIN_GRACE_S = 25.0
"""Default of gateway and workers."""
NODE_DRAIN_GRACE_S = 5.0
"""Default of KV nodes."""
TRAINER_DRAIN_GRACE_S = 5.0
"""Default of the trainer."""

LOCAL_PACE = {
    "PACELINE_WINDOW_S": "15",
    "PACELINE_STALE_S": "10",
    "PACELINE_PERIOD_S": "1",
    "PACELINE_START_UP_S": "10",
}
"""Defaults of the autoscaler's own environment variables that suit one machine: everything is
scraped each second, and a worker is up in seconds."""

_THREAD_VARS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """The children that a platform starts with, in the order of their start. Redis runs before;
    Prometheus and the autoscaler follow once the gateway's address is known.
    """

    kv_nodes: tuple[ChildSpec, ...]
    workers: tuple[ChildSpec, ...]
    trainers: tuple[ChildSpec, ...]
    gateway: ChildSpec

    @property
    def specs(self) -> tuple[ChildSpec, ...]:
        """All of them."""
        return (*self.kv_nodes, *self.workers, *self.trainers, self.gateway)


class FleetPlanner:
    """Knows how each child of one platform is started."""

    def __init__(
        self, options: PlatformOptions, fleet: str, redis_url: str, environ: Mapping[str, str]
    ) -> None:
        self._options = options
        # By environment, since a URL may hold a password and command lines are public.
        own = {EXIT_WITH_PARENT_VAR: "1", "PACELINE_REDIS_URL": redis_url}
        # gRPC's core writes plain lines between our JSON ones unless told not to.
        self._base = {"GRPC_VERBOSITY": "NONE", **environ, **own}
        self._env = with_threads(self._base, 1)
        self._common: dict[str, object] = {"fleet": fleet, "log-level": options.log_level}
        self._shared = {**self._common, "drain-grace-s": options.drain_grace_s}
        self._served = {"model": options.model, "served-model-name": options.served_model_name}

    def plan(self) -> FleetPlan:
        """Return the processes to start."""
        options = self._options
        counts = (("prefill", options.num_prefill), ("decode", options.num_decode))
        wants_trainer = has_draft(options) if options.has_trainer is None else options.has_trainer
        return FleetPlan(
            kv_nodes=tuple(self._kv_node(i) for i in range(options.num_kv_nodes)),
            workers=tuple(self.worker(role, i) for role, count in counts for i in range(count)),
            trainers=(self._trainer(),) if wants_trainer else (),
            gateway=self._gateway(),
        )

    def worker(self, role: str, number: int) -> ChildSpec:
        """Return the worker of a role and number."""
        options = self._options
        flags = {
            "member-id": f"{role}-{number}",
            "role": role,
            "kv-node": worker_node(options.num_kv_nodes, role, number),
            **self._served,
            **self._shared,
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
            "min-step-s": options.min_step_s,
            "capture-hidden": options.learn == MEDUSA_DRAFTER or None,
        }
        argv = _command("paceline.worker", flags)
        env = with_threads(self._base, options.threads or 1)
        grace_s = _grace_s(options, WORKER_DRAIN_GRACE_S)
        return ChildSpec(f"{role}-{number}", role, argv, env, grace_s)

    def autoscaler(self, control: str, prometheus_url: str) -> ChildSpec:
        """Return the autoscaler of this platform, whose pools are set at `control`."""
        scaling, limit = self._options.autoscale, self._options.worker_limit
        assert scaling is not None, "nobody asked for an autoscaler"
        flags = {
            "member-id": AUTOSCALER_ID,
            "target": "local",
            "control-address": control,
            "policy": scaling.policy,
            "slo-ttft-s": scaling.slo_ttft_s,
            "slo-itl-s": scaling.slo_itl_s,
            "prefill-min": scaling.min_prefill,
            "prefill-max": limit if scaling.max_prefill is None else scaling.max_prefill,
            "decode-min": scaling.min_decode,
            "decode-max": limit if scaling.max_decode is None else scaling.max_decode,
            "idle-s": scaling.scale_to_zero_s,
            **self._common,
        }
        argv = _command("paceline.autoscaler", flags)
        # The URL by environment, too: it may hold credentials.
        env = {**LOCAL_PACE, **self._env, "PACELINE_PROMETHEUS_URL": prometheus_url}
        return ChildSpec(AUTOSCALER_ID, "autoscaler", argv, env, KILL_MARGIN_S)

    def _kv_node(self, number: int) -> ChildSpec:
        options, name = self._options, node_id(number)
        flags = {
            "member-id": name,
            **self._shared,
            "arena-mb": options.arena_mb,
            "transport": options.kv_transport,
        }
        argv = _command("paceline.kvstore", flags)
        return ChildSpec(name, "kvstore", argv, self._env, _grace_s(options, NODE_DRAIN_GRACE_S))

    def _trainer(self) -> ChildSpec:
        options = self._options
        flags = {
            "member-id": TRAINER_ID,
            "model": options.model,
            "draft": options.draft,
            "draft-registry": options.draft_registry,
            "learn": options.learn,
            **self._shared,
        }
        argv = _command("paceline.trainer", flags)
        grace_s = _grace_s(options, TRAINER_DRAIN_GRACE_S)
        return ChildSpec(TRAINER_ID, "trainer", argv, self._env, grace_s)

    def _gateway(self) -> ChildSpec:
        options = self._options
        flags = {
            "member-id": GATEWAY_ID,
            "grpc-port": options.grpc_port,
            "http-port": options.http_port,
            "api-keys": options.api_keys,
            **self._served,
            **self._shared,
        }
        argv = _command("paceline.gateway", flags)
        grace_s = _grace_s(options, WORKER_DRAIN_GRACE_S)
        return ChildSpec(GATEWAY_ID, "gateway", argv, self._env, grace_s)


def worker_node(num_kv_nodes: int, role: str, number: int) -> str:
    """Return the KV node of a worker.

    With several nodes the two roles never share one, so that KV really travels.
    """
    half = max(1, num_kv_nodes // 2)
    if role == "prefill" or num_kv_nodes == 1:
        return node_id(number % half)
    return node_id(half + number % (num_kv_nodes - half))


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
