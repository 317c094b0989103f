"""What a bench is asked to do: plain values that travel from the command line. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


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
    def from_json(cls, text: str) -> BenchOptions:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))
