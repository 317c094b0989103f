"""The files of a checkpoint and its digest, without reading tensors: no torch.

Shard names from the index must stay inside the checkpoint's directory. engine/weights reads the
tensors; workers and the trainer use this file from processes that never load torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from blake3 import blake3

from paceline.domain.errors import PacelineError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class UnsupportedModelError(PacelineError):
    """The checkpoint cannot be served; the message names the key and its value."""

    reason = "unsupported-model"


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
    """Return the blake3 digest, hexadecimal, of configuration and all weight bytes.

    Raises:
        UnsupportedModelError: it is no checkpoint.
    """
    hasher = blake3(max_threads=blake3.AUTO)
    try:
        config = dict(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UnsupportedModelError(f"config.json: {error}") from error
    # The writer's version says nothing about the model.
    config.pop("transformers_version", None)
    hasher.update(json.dumps(config, sort_keys=True).encode())
    for path in weight_files(directory):
        hasher.update_mmap(path)
    return hasher.hexdigest()
