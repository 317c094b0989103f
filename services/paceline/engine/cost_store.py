"""Keeps measured step costs between starts, one JSON file per model, dtype and machine.

A fit is only as good as what it was measured on, so its key names all that step times depend
on, and whoever loads one checks it with a few steps (cost.py). A file that cannot be read, or
is of another key or form, counts as absent; one that cannot be written is done without.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3

from paceline.domain.cost import StepCost

logger = logging.getLogger(__name__)

_FORMAT = 2
"""Changes with the form of the file or the meaning of its numbers."""


@dataclass(frozen=True, slots=True)
class CostKey:
    """What a fit was measured on."""

    model_digest: str
    dtype: str
    machine: str
    """`processor_fingerprint` of it."""
    threads: int
    backend: str
    """What computes, with its version."""
    block_size: int
    chunk_tokens: int
    max_context_tokens: int
    """Longest sequence that could be timed."""
    batch_invariant: bool


class CostStore:
    """Fits under one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "step-cost"

    @contextmanager
    def exclusive(self, key: CostKey) -> Iterator[None]:
        """Keep other processes out of this key meanwhile; ends with the process, whatever."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            lock = open(self._path(key).with_suffix(".lock"), "wb")  # noqa: SIM115
        except OSError:
            yield
            return
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def load(self, key: CostKey) -> StepCost | None:
        """Return the fit kept for a key, or None."""
        try:
            data = json.loads(self._path(key).read_text(encoding="utf-8"))
            if data["format"] != _FORMAT or data["key"] != asdict(key):
                return None
            return StepCost.from_json(data["cost"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("step-cost-unreadable", extra={"fields": {"error": str(error)}})
            return None

    def save(self, key: CostKey, cost: StepCost) -> None:
        """Keep a fit; readers see the old file or the whole new one."""
        data = {"format": _FORMAT, "key": asdict(key), "cost": asdict(cost)}
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._directory, suffix=".tmp", delete=False, encoding="utf-8"
            ) as file:
                json.dump(data, file)
            os.replace(file.name, self._path(key))
        except OSError as error:
            logger.warning("step-cost-not-kept", extra={"fields": {"error": str(error)}})

    def _path(self, key: CostKey) -> Path:
        text = json.dumps(asdict(key), sort_keys=True)
        return self._directory / f"{blake3(text.encode()).hexdigest(length=16)}.json"


def processor_fingerprint() -> str:
    """Return a digest of what the system says the processor is and can do."""
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "cache size")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return os.uname().machine
    known = [line for line in lines.splitlines() if line.partition(":")[0].strip() in names]
    return blake3("\n".join(known).encode()).hexdigest(length=8) if known else os.uname().machine
