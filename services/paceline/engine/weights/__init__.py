"""Reads checkpoints: safetensors only, one file or sharded. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from paceline.engine.checkpoint_files import UnsupportedModelError
from paceline.engine.checkpoint_files import model_digest as model_digest
from paceline.engine.checkpoint_files import weight_files as weight_files


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
