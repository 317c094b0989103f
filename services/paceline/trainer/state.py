"""A learner's state on disk: whole or not at all, the previous one kept beside it.

    state/00000041/   weights, moments, replay, domains (safetensors), values.json, manifest.json
    state/00000042/   the next; 00000041 goes when 00000043 comes

The manifest has the digest of every file and is what makes a directory a state: one that is torn or
rotten is passed over, with a reason in the log, for the one before.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from paceline.trainer.files import read_tensors, write_json, write_tensors
from paceline.trainer.learner import OnlineLearner
from paceline.trainer.learner_options import LearnerOptions

logger = logging.getLogger(__name__)

_NUM_KEPT = 2
_MANIFEST, _VALUES = "manifest.json", "values.json"

State = tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]


def resumed_learner(options: LearnerOptions, extra: dict[str, Any]) -> OnlineLearner:
    """Return a learner that goes on from the newest state that is sound, else a fresh one.

    `extra` is filled with what was saved beside it.

    Raises:
        UnsupportedModelError: the options' draft cannot be trained.
    """
    if options.state:
        for tensors, values in load_states(Path(options.state)):
            learner = OnlineLearner(options)
            try:
                learner.restore(tensors, values)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                _refused("it does not fit", error)
                continue
            extra.update(values.get("extra", {}))
            return learner
    return OnlineLearner(options)


def save_state(
    directory: Path,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    values: Mapping[str, Any],
) -> None:
    """Write a state and give up all but the one before.

    Raises:
        OSError: it cannot be written; those that are there stay.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = _names(directory)
    staging = Path(tempfile.mkdtemp(prefix=".", dir=directory))
    try:
        for name, group in tensors.items():
            write_tensors(staging / f"{name}.safetensors", group)
        write_json(staging / _VALUES, values)
        digests = {path.name: _digest(path) for path in sorted(staging.iterdir())}
        write_json(staging / _MANIFEST, digests)
        number = int(names[-1]) + 1 if names else 1
        staging.rename(directory / f"{number:08}")
        _sync(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for name in names[: len(names) + 1 - _NUM_KEPT]:
        shutil.rmtree(directory / name, ignore_errors=True)
    for path in directory.glob(".*"):
        # Of a process that died while it wrote.
        shutil.rmtree(path, ignore_errors=True)


def load_states(directory: Path) -> Iterator[State]:
    """Yield the states that are whole, newest first."""
    for name in reversed(_names(directory)):
        try:
            yield _load(directory / name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _refused(name, error)


def _load(directory: Path) -> State:
    digests = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
    for name, digest in digests.items():
        if _digest(directory / name) != digest:
            raise ValueError(f"{name} is not what was written")
    values = json.loads((directory / _VALUES).read_text(encoding="utf-8"))
    tensors = {
        Path(name).stem: read_tensors(directory / name)
        for name in digests
        if name.endswith(".safetensors")
    }
    return tensors, values


def _names(directory: Path) -> list[str]:
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if path.name.isdecimal())


def _digest(path: Path) -> str:
    return blake3(path.read_bytes()).hexdigest()


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refused(what: str, error: Exception) -> None:
    logger.warning("state-refused", extra={"fields": {"state": what, "error": str(error)}})
