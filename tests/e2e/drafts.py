"""Drafts that are the demo's with other weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import DEMO


def shaken(directory: Path, scale: float, part: str = "") -> Path:
    """Copy the demo's draft with noise of `scale` standard deviations on matrices named `part`."""
    shutil.copytree(DEMO / "draft", directory)
    weights, noise = directory / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if part in name and tensor.dim() > 1:
            shift = scale * tensor.float().std() * torch.randn(tensor.shape, generator=noise)
            tensors[name] = (tensor.float() + shift).to(tensor.dtype)
    save_file(tensors, weights)
    return directory
