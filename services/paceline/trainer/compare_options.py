"""What `paceline bench training` is asked to do: plain values from the command line. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """Making a stream: a target answers prompts, and what it thought is kept."""

    model: str
    """Directory of the target."""
    draft: str
    """Directory of the draft whose guesses decide about origins."""
    prompts: str
    """JSON file: a list of {"token_ids", "domain"}."""
    out: str
    """File to write."""
    temperatures: tuple[float, ...] = (0.0, 0.6, 1.0)
    """Of the answers, in turn."""
    max_tokens: int = 128
    """Generated for each prompt."""
    has_hidden: bool = False
    """Whether samples have the target's hidden states, for heads to learn from."""
    dtype: str = "f32"
    threads: int = 1
    seed: int = 0
    is_quiet: bool = False


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """Learning from a stream in several ways."""

    stream: str
    """File of samples in the order of time."""
    draft: str
    """Directory of the draft that each way starts from."""
    drafters: tuple[str, ...] = ("model",)
    """Kinds of draft that learn (learnables.py)."""
    target: str = ""
    """Directory of the target; heads need it."""
    heads: str = ""
    """Directory of the heads to start from; empty starts with ones that have learned nothing."""
    depth: int = 4
    """Tokens of the chains that are judged; as many heads are new."""
    losses: tuple[str, ...] = ("lk",)
    positions: tuple[str, ...] = ("all",)
    learning_rates: tuple[float, ...] = (2e-4,)
    minutes: float | None = None
    """Time for all ways together; what does not fit of the stream is left out of all. None reads
    all of it."""
    learned_ratio: float = 2.0
    """Tokens learned from for every token that arrives."""
    seconds: float | None = None
    """Training time of each way on the processor, spread over the stream, whatever number of
    tokens that makes; None goes by `learned_ratio`."""
    batch_tokens: int | None = None
    """Tokens behind one optimiser step; None takes what is usual for each kind of draft."""
    threads: int = 1
    seed: int = 0
    is_quiet: bool = False


def to_json(options: RecordOptions | CompareOptions) -> str:
    """Return one line of JSON."""
    return json.dumps({"kind": type(options).__name__, **asdict(options)})


def from_json(text: str) -> RecordOptions | CompareOptions:
    """Read what `to_json` wrote.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    values: dict[str, Any] = json.loads(text)
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (RecordOptions, CompareOptions)}
    kind = kinds[values.pop("kind")]
    lists = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    options: RecordOptions | CompareOptions = kind(**lists)
    return options
