"""Settings of the worker process: flags, environment (PACELINE_*), file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from paceline.domain.member import Role
from paceline.engine.options import EngineOptions
from paceline.process.settings import ServiceSettings

NONE = "none"
"""Means nothing, where an empty value means the default."""


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
    drafters: str = "trie,recycling,model"
    """Who may draft for speculative decoding, names by comma; `none` turns it off. `model` and
    `medusa` take part once there are weights. Prefill workers never draft."""
    draft: str = ""
    """Directory of the small model that drafts; empty takes `draft` in the checkpoint's directory
    if that exists, `none` has no such model."""
    medusa: str = ""
    """Directory of Medusa heads for the model; empty has none."""
    draft_nodes: int = Field(default=16, ge=1, le=256)
    """Most tokens drafted for a sequence per step; the controller chooses how many."""
    draft_depth: int = Field(default=8, ge=1, le=64)
    """Most tokens that one step may bring from a draft."""
    draft_builder: Literal["auto", "chain", "static", "dynamic", "rsd-c", "rsd-s"] = "auto"
    """How trees of a drafting model grow; `auto`: chains for greedy requests, dynamic trees for
    others."""
    verifier: Literal["coupled", "rejection"] = "coupled"
    """`coupled`: tokens are those that come without speculation. `rejection`: equal in
    distribution only, for requests without a seed; those with one stay coupled."""
    capture_share: float = Field(default=0.008, ge=0, le=0.5)
    """Share of the time of steps that may go into capturing samples for the trainer; 0 captures
    nothing. Prefill workers never capture, and no worker a request that forbids it."""
    capture_top: int = Field(default=32, ge=1, le=1024)
    """Tokens named of each captured distribution; 6 bytes each."""
    capture_hidden: bool = False
    """Capture final hidden states, too: 2 bytes per token and hidden size, for drafts that are
    trained on them."""
    draft_cache_dir: Path | None = None
    """Directory of drafts fetched from the trainer; by default under `PACELINE_CACHE_DIR`, else
    `$XDG_CACHE_HOME/paceline`, else `~/.cache/paceline`."""
    draft_cache_mb: int = Field(default=1024, ge=1)
    """Size of that directory in MiB beyond which drafts unused for longest go."""
    itl_target_s: float = Field(default=0.0, ge=0)
    """Longest ITL in seconds that the operator wants; the trainer computes on this machine only
    where that leaves room. 0 leaves room whenever nothing runs."""
    deepen: int = Field(default=0, ge=0)
    """Identity layers added to the model, for measuring: outputs stay, steps take longer."""
    min_step_s: float = Field(default=0.0, ge=0, le=10)
    """Seconds that every step takes at least, for measuring: stands for a device that computes
    beside the processor, so that many workers fit few cores. Outputs stay."""
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
        drafters = () if self.role == Role.PREFILL.value else _names(self.drafters)
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
            drafters=drafters,
            draft=_draft_directory(self.draft, self.model) if drafters else None,
            medusa=self.medusa or None if drafters else None,
            draft_nodes=self.draft_nodes,
            draft_depth=self.draft_depth,
            draft_builder=self.draft_builder,
            deepen=self.deepen,
            min_step_s=self.min_step_s,
            verifier=self.verifier,
            capture_share=0.0 if self.role == Role.PREFILL.value else self.capture_share,
            capture_top=self.capture_top,
            capture_hidden=self.capture_hidden,
        )


def _names(text: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list, each once."""
    if text == NONE:
        return ()
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _draft_directory(draft: str, model: str) -> str | None:
    """Return where the drafting model is, if there is one."""
    if draft == NONE:
        return None
    beside = Path(model) / "draft"
    return draft or (str(beside) if beside.is_dir() else None)
