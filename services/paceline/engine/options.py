"""How an engine is built: plain values that travel from the worker to its engine process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of one engine process."""

    model: str
    """Directory of the checkpoint (Hugging Face layout)."""
    dtype: str = "f32"
    """Format of weights: "f32", "bf16" or "int8"; KV is bf16 for the last two."""
    block_size: int = 16
    """Tokens per KV block."""
    num_kv_blocks: int | None = None
    """KV blocks of the pool; None derives them from `kv_memory_mb`."""
    kv_memory_mb: int = 256
    """Memory of the pool in MiB; touched only as it is used."""
    chunk_tokens: int = 512
    """Most tokens computed in one step."""
    mixed_step_ratio: float = 1.6
    """Longest step with both decoding rows and prompt work, as a multiple of the predicted
    time of the decoding rows alone; below 2, so that prediction errors stay below it too."""
    max_num_seqs: int = 64
    """Most sequences running at a time."""
    threads: int = 1
    """Compute threads."""
    batch_invariant: bool = False
    """Compute each row with the same arithmetic whatever else is in the step. The C++ kernels
    always do, at no cost; torch operations then take one row at a time."""
    deepen: int = 0
    """Identity layers added behind the model's own, for measuring: outputs stay what they are."""
    min_step_s: float = 0.0
    """Seconds that every step takes at least, for measuring: it sleeps the rest, as if a device
    computed beside the processor. Outputs stay what they are."""
    drafters: tuple[str, ...] = ("trie", "recycling", "model")
    """Drafters that may propose, and unions of them ("a+b") beside the usual ones; "model" and
    "medusa" only take part with their weights."""
    draft: str | None = None
    """Directory of a small model that drafts."""
    medusa: str | None = None
    """Directory of Medusa heads for the model."""
    draft_nodes: int = 16
    """Most draft tokens of a sequence in one step."""
    draft_depth: int = 8
    """Longest path of a draft."""
    draft_builder: str = "auto"
    """How a drafting model's trees grow: chain, static, dynamic, rsd-c, rsd-s, or auto: chains for
    greedy requests, dynamic trees for others."""
    verifier: str = "coupled"
    """"coupled": output is token for token that without speculation. "rejection": equal in
    distribution only, for requests without a seed; those with one stay coupled."""
    capture_share: float = 0.0
    """Share of the time of steps that may go into capturing samples to train drafts with; 0
    captures nothing."""
    capture_top: int = 32
    """Tokens named of each captured distribution; no more than the vocabulary has."""
    capture_hidden: bool = False
    """Capture final hidden states, too."""

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineOptions:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "drafters": tuple(values["drafters"])})
