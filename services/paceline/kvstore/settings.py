"""Settings of a KV node: flags, environment (PACELINE_*), file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from paceline.process.settings import ServiceSettings


class KvNodeSettings(ServiceSettings):
    """One node: its arena, its transport, its deadlines."""

    port: int = Field(default=0, ge=0, le=65535)
    """gRPC port; 0 takes any free one."""
    advertise_host: str = ""
    """Host under which peers reach this node; empty means `host`."""
    arena_mb: int = Field(default=256, ge=1)
    """Size of the arena in MiB; memory is taken slab by slab as it is used."""
    arena_dir: str = "/dev/shm"
    """Directory of the arena file; must be memory-backed to be fast."""
    keep_arena: bool = False
    """Leaves the arena file on an orderly stop, for a node that comes back soon."""
    transport: Literal["shm", "grpc"] = "shm"
    """How peers get blocks: `shm` copies from the arena file where they can see it,
    `grpc` always goes over the network. Workers of this machine always use the arena."""
    policy: Literal["s3fifo", "fifo"] = "s3fifo"
    """Which block goes when space is needed."""
    pull_timeout_s: float = Field(default=2.0, gt=0, le=60)
    """Seconds an Acquire or Pull waits for peers; later the worker computes for itself."""
    lease_s: float = Field(default=60.0, gt=0)
    """Life in seconds of pins, and of sessions whose end went unnoticed."""
    drain_grace_s: float = Field(default=5.0, ge=0)
    """Seconds that running calls get on SIGTERM."""
