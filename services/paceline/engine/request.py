"""One request's state in the engine: its sequences, their tokens, pages and phases.

Scheduler and engine change these; nothing outside the engine sees them.

    WAITING ──admit──> RUNNING ──finish──> FINISHED
       ^                  │
       └────preempt───────┘
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from paceline.domain.blocks import block_key, tail_key
from paceline.domain.errors import InvalidRequestError
from paceline.domain.progress import DraftRound
from paceline.domain.request import FinishReason, GenerationSpec
from paceline.engine.page_table import PageTable


class Phase(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One output of a request, or the leader that computes the prompt for several.

    token_ids  [ prompt ............ | output ........ ]
               [0 .. num_computed) have KV in `pages`; the rest is still to compute
    """

    id: int
    request: Request
    index: int
    token_ids: list[int]
    phase: Phase = Phase.WAITING
    num_computed: int = 0
    pages: PageTable = field(default_factory=PageTable)
    keys: list[bytes] = field(default_factory=list)
    """Keys of the full blocks of `token_ids`, as far as they were needed."""
    num_registered: int = 0
    """Leading blocks that are in the prefix cache (or were found there)."""
    num_stored: int = 0
    """Leading blocks that need not be written to the KV store (any more)."""
    has_queued_tail: bool = False
    """Whether the prompt's partial last block was handed to the KV store (prefill only)."""
    pending_copy: tuple[int, int] | None = None
    """(source, destination) pages of a fork: copied with its first row; the source is held."""
    finish_reason: FinishReason | None = None
    has_looked_up: bool = False
    """Whether the KV store was asked since the sequence last started waiting."""
    arrived_at: int | None = None
    """Steps done when it first started waiting."""
    streams_since: int | None = None
    """Steps done when its first token was drawn here."""
    num_prompt: int = field(init=False)
    """Tokens of the prompt."""

    def __post_init__(self) -> None:
        self.num_prompt = len(self.request.spec.prompt_token_ids)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def is_leader(self) -> bool:
        """Whether it only computes the prompt, for siblings or for the store."""
        request = self.request
        return request.is_prefill_only or (not request.is_forked and request.spec.n > 1)

    @property
    def target(self) -> int:
        """Tokens to compute before something else happens than computing.

        A leader stops one short of the prompt: the last prompt token is computed by whoever
        draws from its logits.
        """
        return self.num_prompt - 1 if self.is_leader else len(self.token_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens still to compute up to the target."""
        return self.target - self.num_computed

    @property
    def max_cached(self) -> int:
        """Tokens that may come from a cache: what is drawn from must be computed."""
        return self.target if self.is_leader else self.target - 1

    def order(self) -> tuple[int, int, int]:
        """Return the sort key of queues: who runs first."""
        return (*self.request.order, self.index)

    @property
    def held_pages(self) -> list[int]:
        """Pages it is a holder of."""
        return [*self.pages, *(self.pending_copy[:1] if self.pending_copy else ())]

    def block_keys(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Return the keys of the first `num_blocks` full blocks."""
        while len(self.keys) < num_blocks:
            start = len(self.keys) * block_size
            parent = self.keys[-1] if self.keys else self.request.root
            self.keys.append(
                block_key(self.request.key, parent, self.token_ids[start : start + block_size])
            )
        return self.keys[:num_blocks]

    def tail_key(self, block_size: int) -> bytes:
        """Return the key of the partial block in front of the last prompt token, or b""."""
        last = self.num_prompt - 1
        num_full = last // block_size
        if last % block_size == 0:
            return b""
        keys = self.block_keys(num_full, block_size)
        parent = keys[-1] if keys else self.request.root
        tokens = self.token_ids[num_full * block_size : last]
        return tail_key(self.request.key, parent, tokens, self.request.fleet_id)


@dataclass(slots=True, eq=False)
class Request:
    """A submitted request."""

    spec: GenerationSpec
    key: bytes
    """blake3 key of its block hashes."""
    root: bytes
    """Parent of its first block."""
    arrival: int
    """Order of arrival."""
    fleet_id: str = ""
    """The request's id in the fleet, which keys its prompt's tail block."""
    is_prefill_only: bool = False
    resumed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    finished_indices: frozenset[int] = frozenset()
    sequences: list[Sequence] = field(default_factory=list)
    is_forked: bool = False
    local_hit_tokens: int = 0
    store_hit_tokens: int = 0
    has_reported_hits: bool = False
    num_unsaved: int = 0
    """Blocks queued for the store and not written yet."""
    is_traced: bool = False
    rounds: list[DraftRound] = field(default_factory=list)
    """Drafts of a traced request that were not reported yet."""

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: who runs first."""
        return (-self.spec.priority, self.arrival)

    @property
    def open_indices(self) -> list[int]:
        """Outputs that are not known to need no tokens."""
        return [i for i in range(self.spec.n) if i not in self.finished_indices]

    @property
    def num_prompt_computed(self) -> int:
        """Prompt tokens whose KV exists, by the furthest of its sequences."""
        num_prompt, furthest = len(self.spec.prompt_token_ids), 0
        for sequence in self.sequences:
            if len(sequence.token_ids) > num_prompt:
                return num_prompt
            furthest = max(furthest, sequence.num_computed)
        return min(num_prompt, furthest)

    @property
    def is_finished(self) -> bool:
        """Whether every sequence ended."""
        return all(s.phase is Phase.FINISHED for s in self.sequences)


def check_tokens(request: Request, max_context_tokens: int, vocab_size: int) -> None:
    """Refuse what the runner could not compute, before it is in a step with others.

    Raises:
        InvalidRequestError: the prompt is empty, does not fit, or names unknown tokens.
    """
    prompt, limit = request.spec.prompt_token_ids, max_context_tokens
    outputs = [request.resumed.get(index, ()) for index in request.open_indices]
    longest = len(prompt) + max(map(len, outputs), default=0)
    if not 0 < len(prompt) < limit or longest > limit:
        raise InvalidRequestError("prompt", f"{longest} tokens, the context holds {limit}")
    for tokens in [prompt, *outputs]:
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise InvalidRequestError("prompt", f"token ids end at {vocab_size - 1}")
