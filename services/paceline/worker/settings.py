"""Settings of the worker process: flags, environment (PACELINE_*), file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from paceline.engine.options import EngineOptions
from paceline.process.settings import ServiceSettings


class WorkerSettings(ServiceSettings):
    """One worker: its role, its model and its engine."""

    role: Literal["prefill", "decode"] = "decode"
    """What the worker does in the fleet."""
    model: str
    """Directory of the checkpoint (Hugging Face layout)."""
    served_model_name: str = ""
    """Name that clients use; empty means the directory's name."""
    port: int = Field(default=0, ge=0, le=65535)
    """gRPC port; 0 takes any free one."""
    kv_node: str = ""
    """KV store node: `host:port` or a member id; empty runs without a store."""
    dtype: Literal["f32", "bf16", "int8"] = "f32"
    """Format of weights: f32 is exact against reference implementations, int8 has one scale
    per output and per token and keeps KV in bf16."""
    block_size: int = Field(default=16, ge=1, le=4096)
    """Tokens per KV block; all workers and nodes of a fleet must agree."""
    num_kv_blocks: int | None = Field(default=None, ge=2)
    """KV blocks of the engine's pool; unset derives them from kv_memory_mb."""
    kv_memory_mb: int = Field(default=256, ge=1)
    """Memory of the engine's KV pool in MiB; touched only as it is used."""
    chunk_tokens: int = Field(default=512, ge=1)
    """Most tokens per engine step, reached while nothing decodes; larger ones gain little."""
    mixed_step_ratio: float = Field(default=1.6, ge=1)
    """How much longer than its decoding rows alone a step may be predicted to take with prompt
    work in it; smaller keeps ITL low, larger keeps TTFT low while others decode."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most sequences that run at a time; more wait."""
    max_requests: int = Field(default=1024, ge=1)
    """Most requests that the worker carries, waiting ones included; more are refused."""
    threads: int = Field(default=1, ge=1)
    """Compute threads of the engine."""
    engine_stall_s: float = Field(default=30.0, gt=0)
    """Seconds without a sign of life after which the engine counts as hung and the worker
    ends; never below the time of ten predicted full steps."""
    drain_notice_s: float = Field(default=0.3, ge=0)
    """Seconds between telling the fleet that the worker leaves and refusing calls: gateways
    look every 0.1 s."""
    drain_grace_s: float = Field(default=25.0, ge=0)
    """Seconds that running requests get to finish on SIGTERM; then they end as retryable."""

    def engine_options(self) -> EngineOptions:
        """Return what the engine process needs to know."""
        return EngineOptions(
            model=self.model,
            dtype=self.dtype,
            block_size=self.block_size,
            num_kv_blocks=self.num_kv_blocks,
            kv_memory_mb=self.kv_memory_mb,
            chunk_tokens=self.chunk_tokens,
            mixed_step_ratio=self.mixed_step_ratio,
            max_num_seqs=self.max_num_seqs,
            threads=self.threads,
        )
