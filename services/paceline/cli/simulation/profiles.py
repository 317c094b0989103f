"""What one replica can do: presets, files, and checkpoints that were measured on this machine.

    8b-a100   8B on an 80 GB accelerator of the A100's kind; the default
    8b-h100   8B on one of the H100's kind
    8b-l4     8B with int8 weights on a 24 GB accelerator
    demo-cpu  the demo model on two cores, as measured

The first three are derived (roofline.py), the last one was measured by `paceline bench cost`. With
the default one hour of Azure's code trace takes a fixed fleet of 9 replicas for a TTFT of 2 s and
an ITL of 0.05 s, one of Mooncake's conversations 12 to 14 for a TTFT of 5 s: enough for sizes to
matter. On the H100's kind it is 3 and 6, where a policy has little to decide; on the L4's kind
every second conversation needs more than 1 s for its prompt alone, and a quarter more than 3 s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from paceline.autoscaler.values import Replica
from paceline.cli.errors import CommandError
from paceline.cli.simulation import roofline
from paceline.cli.simulation.quick_cost import QuickStepCost
from paceline.domain.cost import StepCost
from paceline.domain.directories import cache_directory
from paceline.domain.errors import PacelineError
from paceline.engine.checkpoint_files import model_digest

DEFAULT_PROFILE = "8b-a100"


@dataclass(frozen=True, slots=True)
class Profile:
    """A replica and the machines it stands on."""

    name: str
    replica: Replica
    kv_token_bytes: int
    mixed_step_ratio: float = 1.6
    """As in the worker's settings."""
    workers_per_node: int = 8
    """Workers that share one KV node."""
    store_tokens: int = 8_000_000
    """Tokens whose KV a node keeps: of 128 KiB each, half of the 2 TB that eight-GPU hosts have."""
    near_bytes_per_s: float = 2e10
    """KV between a node's memory and a worker: PCIe 4.0 x16 at two thirds."""
    far_bytes_per_s: float = 1e10
    """KV between nodes: 100 Gbit/s at four fifths."""
    hop_s: float = 0.01
    """Handing a request from a prefill to a decode worker."""


def find_profile(name: str) -> Profile:
    """Return a preset, a JSON file's, or that of a checkpoint measured on this machine.

    A file holds `step_cost` (as workers publish it), `chunk_tokens`, `max_rows`, `kv_tokens` and
    `kv_token_bytes`; further fields of `Profile` may be there.

    Raises:
        CommandError: there is no such preset, file or measurement; says what would do.
    """
    if name in PRESETS:
        return PRESETS[name]()
    path = Path(name)
    if path.is_dir():
        return _measured(path)
    if path.is_file():
        try:
            return _from_json(path.stem, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(f"--replica {path}: {_said(error)}") from error
    known = ", ".join(PRESETS)
    raise CommandError(f"--replica {name}: no file, no directory, and none of {known}")


def _derived(
    name: str,
    accelerator: roofline.Accelerator,
    model: roofline.TransformerSize,
    chunk_tokens: int,
) -> Profile:
    cost = QuickStepCost(roofline.roofline_cost(accelerator, model))
    room = roofline.kv_tokens(accelerator, model)
    return Profile(name, Replica(cost, chunk_tokens, 256, room), model.kv_token_bytes)


def _demo() -> Profile:
    file = resources.files(__package__) / "demo_cpu.json"
    return _from_json("demo-cpu", json.loads(file.read_text(encoding="utf-8")))


PRESETS: dict[str, Callable[[], Profile]] = {
    "8b-a100": lambda: _derived("8b-a100", roofline.A100, roofline.LLAMA_8B, 2048),
    "8b-h100": lambda: _derived("8b-h100", roofline.H100, roofline.LLAMA_8B, 2048),
    "8b-l4": lambda: _derived("8b-l4", roofline.L4, roofline.LLAMA_8B_INT8, 2048),
    "demo-cpu": _demo,
}


def _from_json(name: str, data: dict[str, Any]) -> Profile:
    replica = Replica(
        step_cost=QuickStepCost(StepCost.from_json(data["step_cost"])),
        chunk_tokens=_whole(data, "chunk_tokens"),
        max_rows=_whole(data, "max_rows"),
        kv_tokens=_whole(data, "kv_tokens"),
    )
    required = {"step_cost", "chunk_tokens", "max_rows", "kv_tokens", "kv_token_bytes"}
    floats = ("mixed_step_ratio", "near_bytes_per_s", "far_bytes_per_s", "hop_s")
    wholes = ("workers_per_node", "store_tokens")
    unknown = sorted(set(data) - required - {*floats, *wholes, "about"})
    if unknown:
        raise ValueError(f"unknown fields {', '.join(unknown)}")
    given: dict[str, Any] = {key: float(data[key]) for key in floats if key in data}
    given |= {key: _whole(data, key) for key in wholes if key in data}
    return Profile(name, replica, _whole(data, "kv_token_bytes"), **given)


def _whole(data: dict[str, Any], key: str) -> int:
    value = int(data[key])
    if value < 1:
        raise ValueError(f"{key} {value}: expected at least 1")
    return value


def _said(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


# -- checkpoints --------------------------------------------------------------------------

_KV_MEMORY_BYTES = 256 << 20
_MAX_ROWS = 64
_CPU = {
    "workers_per_node": 64,
    "store_tokens": 200_000,
    "near_bytes_per_s": 4e9,
    "far_bytes_per_s": 4e8,
}
"""Defaults of the worker's and the gateway's settings on one machine."""


def _measured(directory: Path) -> Profile:
    """Read the newest step cost that a worker with this checkpoint kept (engine/cost_store.py)."""
    try:
        digest = model_digest(directory)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (PacelineError, OSError, ValueError) as error:
        raise CommandError(f"--replica {directory}: {error}") from error
    kept = cache_directory(os.environ) / "step-cost"
    newest_first = sorted(kept.glob("*.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in newest_first:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            key = data["key"]
            # Behind a plus stands how many layers were added for measuring.
            if key["model_digest"].partition("+")[0] == digest:
                return _of_checkpoint(directory.name, config, key, data["cost"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise CommandError(
        f"--replica {directory}: no step cost of it is kept on this machine; "
        f"`paceline up --model {directory}` measures one"
    )


def _of_checkpoint(
    name: str, config: dict[str, Any], key: dict[str, Any], cost: dict[str, Any]
) -> Profile:
    heads = int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    added = int(key["model_digest"].partition("+")[2] or 0)
    layers = int(config["num_hidden_layers"]) + added
    element_bytes = 4 if key["dtype"] == "f32" else 2
    kv_token_bytes = 2 * layers * kv_heads * head_size * element_bytes
    return _from_json(
        name,
        {
            "step_cost": cost,
            "chunk_tokens": key["chunk_tokens"],
            "max_rows": _MAX_ROWS,
            "kv_tokens": _KV_MEMORY_BYTES // kv_token_bytes,
            "kv_token_bytes": kv_token_bytes,
            **_CPU,
        },
    )
