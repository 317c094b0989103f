"""Checkpoints small enough to keep hundreds of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TARGET = "t" * 64


def make_checkpoint(directory: Path, number: int, num_shards: int = 1, size: int = 64) -> Path:
    """Write a checkpoint whose weights are this number."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "n": number}))
    (directory / "tokenizer.json").write_text("{}")
    if num_shards == 1:
        save_file({"w": np.full(size, number, np.float32)}, directory / "model.safetensors")
        return directory
    names = {}
    for shard in range(num_shards):
        names[f"w{shard}"] = f"model-{shard}.safetensors"
        values = np.full(size, number + shard, np.float32)
        save_file({f"w{shard}": values}, directory / names[f"w{shard}"])
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    return directory
