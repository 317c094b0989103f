"""What a bench is asked to do: plain values that travel from the command line. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Options of one bench; each reads what concerns it."""

    model: str
    """Directory of the checkpoint."""
    dtype: str = "f32"
    """Element type of weights and KV."""
    threads: int = 1
    """Compute threads."""
    prompt_len: int = 512
    """Tokens of each prompt."""
    gen_len: int = 128
    """Tokens generated for each prompt."""
    concurrency: int = 1
    """Requests, all submitted at once."""
    seed: int = 0
    """Of the prompts."""
    batch_invariant: bool = False
    """Measure with numbers that do not depend on the batch."""
    is_quiet: bool = False
    """Print nothing but the report."""

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class SpecOptions(BenchOptions):
    """Options of `paceline bench spec`."""

    prompts: str = ""
    """File with a JSON list of {"token_ids": [...], "domain": "..."}."""
    drafter: str = "auto"
    """A drafter, "auto" or "off"."""
    draft: str | None = None
    """Directory of the draft model."""
    medusa: str | None = None
    """Directory of Medusa heads."""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 128
    """Generated for each prompt at most."""
    ignore_eos: bool = False
    deepen: int = 0
    """Identity layers added to the model."""
    nodes: int = 16
    """Most draft tokens of a sequence in one step."""
    depth: int = 8
    """Longest path of a draft."""
    builder: str = "auto"
    verifier: str = "coupled"
    rounds: int = 3
    """Times that both ways run."""
    capture: bool = False
    """Capture samples, and run the drafter without that as a third way."""
