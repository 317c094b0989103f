"""What the user asked of `paceline up`: plain values; None leaves a setting to the services."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paceline.domain.drafts import MODEL_DRAFTER

MAX_WORKERS = 16
"""Workers of one role that a platform may have, unless the user says how many."""


@dataclass(frozen=True, slots=True)
class AutoscaleOptions:
    """Within what bounds and to which end the autoscaler works."""

    min_prefill: int | None = None
    max_prefill: int | None = None
    min_decode: int | None = None
    max_decode: int | None = None
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None
    policy: str | None = None
    scale_to_zero_s: float | None = None
    """Seconds without a request after which pools without a minimum of their own are emptied."""


@dataclass(frozen=True, slots=True)
class PlatformOptions:
    """The platform as a whole."""

    model: Path
    num_prefill: int = 1
    num_decode: int = 1
    max_workers: int | None = None
    """Most workers of one role, whoever asks for them."""
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
    min_step_s: float | None = None
    has_trainer: bool | None = None
    """Whether there is a trainer; None has one if there is a draft for it to look after."""
    draft_registry: Path | None = None
    learn: str | None = None
    """What the trainer's learner trains: model or medusa."""
    arena_mb: int | None = None
    kv_transport: str | None = None
    autoscale: AutoscaleOptions | None = None
    """None leaves the number of workers as it is."""
    has_prometheus: bool = False
    """Whether a Prometheus is wanted beside what the autoscaler needs."""
    prometheus_url: str | None = None
    """Prometheus to use; None starts a private one where one is needed."""
    log_level: str | None = None
    drain_grace_s: float | None = None

    @property
    def worker_limit(self) -> int:
        """Most workers of one role."""
        if self.max_workers is not None:
            return self.max_workers
        return max(MAX_WORKERS, self.num_prefill, self.num_decode)

    @property
    def starts_prometheus(self) -> bool:
        """Whether a private Prometheus is to be started."""
        is_needed = self.has_prometheus or self.autoscale is not None
        return is_needed and not self.prometheus_url


def has_draft(options: PlatformOptions) -> bool:
    """Whether workers will draft with a small model, so that there is one to improve."""
    drafters = options.drafters
    if options.draft == "none" or (
        drafters is not None and MODEL_DRAFTER not in drafters.split(",")
    ):
        return False
    return bool(options.draft) or (options.model / "draft" / "config.json").is_file()
