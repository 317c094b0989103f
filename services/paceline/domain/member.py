"""What a process says about itself to the fleet: identity, address, model, load.

process/membership.py stores members in Redis under a lease; gateway/fleet.py reads them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from paceline.domain.cost import StepCost


class Role(Enum):
    """What a process does in the fleet."""

    GATEWAY = "gateway"
    PREFILL = "prefill"
    DECODE = "decode"
    KVSTORE = "kvstore"
    TRAINER = "trainer"
    AUTOSCALER = "autoscaler"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a worker serves, as clients and the gateway's hashing need it."""

    name: str
    digest: str
    kv_root: bytes
    block_size: int
    block_bytes: int
    max_context_tokens: int
    vocab_size: int
    kv_dtype: str = ""
    """Element type of the KV."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a worker is."""

    num_waiting: int = 0
    num_running: int = 0
    pending_prefill_tokens: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    context_tokens: int = 0
    drafted_tokens: int = 0
    """Draft tokens verified since the worker's start."""
    accepted_tokens: int = 0
    """Those that were accepted."""


@dataclass(frozen=True, slots=True)
class Member:
    """One process of the fleet. `epoch` grows with every incarnation of an id."""

    id: str
    role: Role
    address: str
    """host:port of its gRPC server."""
    pid: int
    version: str
    epoch: int = 0
    metrics_address: str = ""
    """host:port of its /metrics."""
    node_id: str = ""
    """KV store node it is attached to (workers) or is (nodes)."""
    kv_uri: str = ""
    """Transport URI under which other nodes fetch blocks of its node."""
    is_draining: bool = False
    model: ModelCard | None = None
    step_cost: StepCost | None = None
    prefill_chunk_tokens: int = 0
    max_rows: int = 0
    """Sequences that it runs at a time; 0 where a worker does not tell."""
    drafters: tuple[str, ...] = ()
    """Drafters that requests may name (decode workers)."""
    draft_version: str = ""
    """Version of the draft model in use, if there is one."""
    load: Load = field(default_factory=Load)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        out = asdict(self)
        out["role"] = self.role.value
        if self.model is not None:
            out["model"]["kv_root"] = self.model.kv_root.hex()
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Member:
        """Read what `to_json` wrote; unknown keys of newer versions are ignored.

        Raises:
            KeyError, TypeError, ValueError: the data is not a member.
        """
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        known["role"] = Role(known["role"])
        if known.get("model") is not None:
            card = _known(ModelCard, known["model"])
            card["kv_root"] = bytes.fromhex(card["kv_root"])
            known["model"] = ModelCard(**card)
        if known.get("step_cost") is not None:
            known["step_cost"] = StepCost.from_json(known["step_cost"])
        known["drafters"] = tuple(map(str, known.get("drafters") or ()))
        known["load"] = Load(**_known(Load, known.get("load") or {}))
        return cls(**known)

    def with_load(self, load: Load) -> Member:
        """Return the member with another load."""
        return replace(self, load=load)


def _known(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k in cls.__dataclass_fields__}  # type: ignore[attr-defined]
