"""How big a draft of a target should be, and whether making it fits into memory.

A draft runs several times for each step of the target, so it has to be much cheaper: here at
most a fourteenth of the target's weights. They go into width rather than depth (FastDraft, Zafrir
et al. 2024): a wide embedding keeps more of the target's, and one layer is quickly
run.
"""

from __future__ import annotations

from pathlib import Path

from paceline.domain.errors import InvalidRequestError
from paceline.engine.models.config import ModelConfig
from paceline.engine.weights import weight_files
from paceline.trainer.decoder import DraftShape

MAX_COST_RATIO = 1 / 14
"""Of the target's weights."""

_WIDTH_STEP = 32
_LEAST_WIDTH = 32
_MOST_HEAD_DIM = 64
_INNER_RATIO = 3


def draft_shape(config: ModelConfig, num_layers: int, hidden_size: int | None) -> DraftShape:
    """Return the sizes of a draft; half of the target's width if that is cheap enough."""
    if hidden_size is not None:
        return _shape(config, num_layers, hidden_size)
    limit = MAX_COST_RATIO * target_parameters(config)
    width = max(_LEAST_WIDTH, config.hidden_size // 2 // _WIDTH_STEP * _WIDTH_STEP)
    while width > _LEAST_WIDTH and _shape(config, num_layers, width).num_parameters > limit:
        width -= _WIDTH_STEP
    return _shape(config, num_layers, width)


def _shape(config: ModelConfig, num_layers: int, hidden_size: int) -> DraftShape:
    head_dim = min(_MOST_HEAD_DIM, hidden_size // 2)
    num_heads = max(1, hidden_size // head_dim)
    return DraftShape(
        vocab_size=config.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_INNER_RATIO * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads // 2 if num_heads % 2 == 0 else num_heads,
        head_dim=head_dim,
        max_context_tokens=config.max_context_tokens,
        rope_theta=config.rope_theta,
    )


def target_parameters(config: ModelConfig) -> int:
    """Return the target's number of weights, biases and norms of heads left out."""
    hidden, size = config.hidden_size, config.head_dim
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    layer = hidden * (heads * size + 3 * config.intermediate_size + 2)
    ends = (1 if config.tie_embeddings else 2) * config.vocab_size
    return hidden * (ends + 1) + config.num_layers * layer


def check_memory(
    target: Path, shape: DraftShape, *, batch_tokens: int, pool_bytes: int, meminfo: Path
) -> None:
    """Refuse what cannot fit.

    Raises:
        InvalidRequestError: more memory is needed than Linux says is available.
    """
    weights = sum(path.stat().st_size for path in weight_files(target))
    # The packed weights and, for the time of loading, the file's own; float32 logits of a batch
    # with their gradient and the probabilities between; weights, gradient and two moments.
    needed = 2 * weights + 4 * 4 * batch_tokens * shape.vocab_size
    needed += 4 * 4 * shape.num_parameters + pool_bytes
    available = _available_bytes(meminfo)
    if available is not None and needed > available:
        raise InvalidRequestError(
            "target",
            f"this takes some {needed >> 20} MiB of memory, {available >> 20} are available",
        )


def _available_bytes(meminfo: Path) -> int | None:
    """Return what new processes may take; None where the kernel does not tell."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None
