"""Reads and writes Medusa heads: upstream's layout, as safetensors.

    config.json           model_type "medusa", medusa_num_heads, medusa_num_layers, hidden_size,
                          vocab_size, base_model_digest (optional)
    model.safetensors     {head}.{layer}.linear.weight [E, E], .bias [E]   x + SiLU(W x + b)
                          {head}.{medusa_num_layers}.weight [V, E]         without: the target's

Names and blocks are those of FasterDecoding/Medusa, medusa/model/medusa_model.py (Cai et al.
2024, section 2.1). medusa.py computes them, the trainer writes them.

Shape legend: E hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from paceline.engine.models.config import UnsupportedModelError
from paceline.engine.models.tensors import TensorStore
from paceline.engine.weights import load_tensors

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """Sizes of a set of heads."""

    num_heads: int
    num_layers: int
    """Residual blocks in front of a head."""
    hidden_size: int
    vocab_size: int
    base_model_digest: str | None = None
    """Digest of the checkpoint that the heads were trained on."""


@dataclass(frozen=True, slots=True, eq=False)
class MedusaHead:
    """One head's tensors."""

    blocks: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """Weight [E, E] and bias [E] of each residual block."""
    head_VE: torch.Tensor | None
    """None: the target's."""


def load_medusa(directory: Path) -> tuple[MedusaConfig, list[MedusaHead]]:
    """Read heads, the one for the nearest token first.

    Raises:
        UnsupportedModelError: no such files, or something in them is missing or of another shape.
    """
    config = load_medusa_config(directory)
    return config, _heads(dict(load_tensors(directory)), config)


def save_medusa(directory: Path, tensors: Mapping[str, torch.Tensor], config: MedusaConfig) -> None:
    """Write heads; `load_medusa` reads what was written.

    Raises:
        UnsupportedModelError: the tensors are not those that the configuration tells of.
    """
    _heads(tensors, config)
    directory.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Any] = {
        "model_type": "medusa",
        "medusa_num_heads": config.num_heads,
        "medusa_num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }
    if config.base_model_digest is not None:
        raw["base_model_digest"] = config.base_model_digest
    (directory / _CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    # A copy each: safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    save_file(copies, directory / _WEIGHTS)


def load_medusa_config(directory: Path) -> MedusaConfig:
    """Read the configuration.

    Raises:
        UnsupportedModelError: there is none, or it is not one of Medusa heads.
    """
    try:
        raw = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{_CONFIG}: {error}") from error
    if not isinstance(raw, dict) or raw.get("model_type") != "medusa":
        raise UnsupportedModelError(f"{_CONFIG}: model_type is not medusa")
    digest = raw.get("base_model_digest")
    if digest is not None and not isinstance(digest, str):
        raise UnsupportedModelError(f"base_model_digest: {digest!r} is not a digest")
    return MedusaConfig(
        num_heads=_count(raw, "medusa_num_heads", least=1),
        num_layers=_count(raw, "medusa_num_layers", least=0),
        hidden_size=_count(raw, "hidden_size", least=1),
        vocab_size=_count(raw, "vocab_size", least=1),
        base_model_digest=digest,
    )


def _heads(tensors: Mapping[str, torch.Tensor], config: MedusaConfig) -> list[MedusaHead]:
    """Sort tensors into heads.

    Raises:
        UnsupportedModelError: one is missing, unknown, or of another shape.
    """
    store = TensorStore(tensors.items(), dtype=None)
    size, heads = config.hidden_size, []
    for k in range(config.num_heads):
        blocks = [
            (
                store.take(f"{k}.{i}.linear.weight", (size, size)),
                store.take(f"{k}.{i}.linear.bias", (size,)),
            )
            for i in range(config.num_layers)
        ]
        name, shape = f"{k}.{config.num_layers}.weight", (config.vocab_size, size)
        head_VE = store.take(name, shape) if name in tensors else None
        heads.append(MedusaHead(tuple(blocks), head_VE))
    store.check_empty()
    return heads


def _count(raw: Mapping[str, Any], key: str, *, least: int) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UnsupportedModelError(f"{key}: {value!r} is not a number from {least} on")
    return value
