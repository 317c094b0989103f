"""What making a draft is asked for: plain values that travel from the command line. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """One job of making a draft."""

    target: str
    """Directory of the target's checkpoint."""
    out: str
    """Directory to make."""
    minutes: float
    """Time for writing, learning and measuring; loading the target comes on top."""
    seed: int = 0
    """Of text, order and first weights."""
    threads: int = 1
    """Compute threads."""
    dtype: str = "bf16"
    """Format of the target's weights while it writes."""
    concurrency: int = 32
    """Texts that the target writes at a time."""
    context_tokens: int = 512
    """Longest text; the engine's limit holds too."""
    batch_tokens: int = 4096
    """Tokens of text in one step of training."""
    hidden_size: int | None = None
    """Of the draft; None takes what fits the target."""
    num_layers: int = 1
    """Of the draft."""
    overwrite: bool = False
    """Whether files in `out` may be replaced."""
    prompts: tuple[Tokens, ...] = ()
    """Prompts to answer; without any the target writes the user's turns too."""
    opening: Tokens = ()
    """How a text starts: up to where a user's turn begins, or a document."""
    bridge: Tokens = ()
    """From the end of the user's turn to the beginning of the answer; empty without turns."""
    command: str = ""
    """The command line, for the card."""

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CreateOptions:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        for name in ("opening", "bridge"):
            values[name] = tuple(values[name])
        values["prompts"] = tuple(map(tuple, values["prompts"]))
        return cls(**values)
