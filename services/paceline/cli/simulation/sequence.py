"""One request on its way: what came of it, and where its sequence stands in an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from paceline.cli.simulation.traces import Arrival

STORE_BLOCK_TOKENS = 16
"""Tokens per KV block of the store; what is kept of a sequence is whole blocks."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request, where it stands, and what came of it. Mutable: its owner moves it on."""

    id: int
    arrival: Arrival
    context: int
    """Tokens known: the prompt and what was emitted."""
    left: int
    """Tokens still to come."""
    residue: float
    """Drawn once, 0..1: what rounds its tokens per step, see rows.py."""
    prefix: tuple[bytes, ...] = ()
    """Names of the prompt's full blocks, of `arrival.block_tokens` each."""
    computed: int = 0
    """Tokens whose KV is where the sequence is."""
    target: int = 0
    """Tokens to be computed here before it leaves (prefill) or decodes."""
    order: int = 0
    """Place in the queue of its engine, from 1 on; 0: in none."""
    arrived_step: int = 0
    """Steps that its engine had taken when it came."""
    streams_since: int = 0
    """Step that brought its first token on its engine; 0: none yet."""
    joined: float = 0.0
    """Tokens emitted per sequence of its engine when it began to decode there."""
    ends_at: float = 0.0
    """What they will be when it ends."""
    held_by: str = ""
    """KV node that holds its own blocks."""
    held_tokens: int = 0
    claimed_tokens: int = 0
    """Prompt tokens that its gateway counts as work of its worker."""
    paused_s: float | None = None
    """When it lost its place, while it waits for its next token."""
    is_ended: bool = False

    # What is reported.
    first_token_s: float | None = None
    last_token_s: float | None = None
    cached_tokens: int | None = None
    """Tokens of the prompt found in a store when it was first sent somewhere."""
    prefill_worker: str = ""
    decode_worker: str = ""
    migrations: int = 0
    failure: str = ""
    """Why it was not served; empty: it was."""

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one comes."""
        return self.target - self.computed

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival.at_s

    @property
    def e2e_s(self) -> float | None:
        """Time to the last token."""
        return None if self.last_token_s is None else self.last_token_s - self.arrival.at_s

    @property
    def itl_s(self) -> float | None:
        """Time per token behind the first; None where there is only one."""
        if self.first_token_s is None or self.last_token_s is None:
            return None
        later = self.arrival.output_tokens - 1
        return (self.last_token_s - self.first_token_s) / later if later else None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens of a sequence in a step."""

    sequence: Sequence
    tokens: int


@dataclass(slots=True)
class Steps:
    """Equal steps of an engine in a row: their rows stay, their time changes evenly.

    step i of n takes first_s + i * rise_s; the first begins at start_s.
    """

    start_s: float
    first_s: float
    rise_s: float = 0.0
    num: int = 1
    emitted: float = 1.0
    """Tokens per sequence and step."""
    chunks: list[Chunk] = field(default_factory=list)

    def seconds(self, num: int) -> float:
        """Return what the first steps take."""
        return num * self.first_s + self.rise_s * num * (num - 1) / 2

    @property
    def end_s(self) -> float:
        """When the last one ends."""
        return self.start_s + self.seconds(self.num)

    def num_ended(self, at_s: float) -> int:
        """Return how many have ended at a moment."""
        low, high = 0, self.num
        while low < high:
            middle = (low + high + 1) // 2
            if self.start_s + self.seconds(middle) <= at_s:
                low = middle
            else:
                high = middle - 1
        return low
