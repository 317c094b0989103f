"""Reads checkpoints: safetensors only, one file or sharded.

Nothing is unpickled; shard names from the index must stay inside the checkpoint's directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from paceline.engine.models.config import UnsupportedModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a checkpoint by name, as a view of its mapped file.

    Raises:
        UnsupportedModelError: no safetensors, or a damaged file.
    """
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise UnsupportedModelError(f"{path.name}: {error}") from error


def weight_files(directory: Path) -> list[Path]:
    """Return the checkpoint's safetensors files, sorted by name.

    Raises:
        UnsupportedModelError: there are none, or the index names a file outside.
    """
    index = directory / _INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UnsupportedModelError(f"{_INDEX}: not a weight index") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise UnsupportedModelError(f"{_INDEX}: {name!r} leaves the directory")
    else:
        names = [_SINGLE]
    paths = [directory / name for name in names]
    for path in paths:
        if not path.is_file():
            raise UnsupportedModelError(f"{path.name} is missing; only safetensors are read")
    return paths


def model_digest(directory: Path) -> str:
    """Return the blake3 digest, hexadecimal, of configuration and all weight bytes."""
    hasher = blake3(max_threads=blake3.AUTO)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    # The writer's version says nothing about the model.
    config.pop("transformers_version", None)
    hasher.update(json.dumps(config, sort_keys=True).encode())
    for path in weight_files(directory):
        hasher.update_mmap(path)
    return hasher.hexdigest()
