"""Writes and reads the files of drafts and states: safetensors and JSON, on disk before it returns.

A full disk is an OSError here, whatever library notices it; nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors.

    Raises:
        OSError: it cannot be written.
    """
    # Serialised in memory, since the library's own writer reports a full disk in its own way.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read what `write_tensors` wrote.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON.

    Raises:
        OSError: it cannot be written.
    """
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
