"""Checkpoints small enough for every test: a configuration and one tensor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def make_draft(directory: Path, seed: int, num_floats: int = 1000) -> Path:
    """Write a checkpoint and return its directory; another seed has another digest."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    (directory / "tokenizer.json").write_text("{}")
    values = np.random.default_rng(seed).random(num_floats, dtype=np.float32)
    save_file({"weight": values}, directory / "model.safetensors")
    return directory
