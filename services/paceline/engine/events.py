"""What the engine tells its host after a step.

Values only; worker/engine_process.py encodes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.domain.drafts import DraftState
from paceline.domain.learnings import Sample, SequenceOutcome
from paceline.domain.progress import DraftRound
from paceline.domain.request import TokenChunk
from paceline.engine.ports import StoredBlock
from paceline.engine.spec.report import SpeculationReport


@dataclass(frozen=True, slots=True)
class OutputEvent:
    """News of one request."""

    request_id: str
    chunks: tuple[TokenChunk, ...] = ()
    local_hit_tokens: int = 0
    store_hit_tokens: int = 0
    computed_tokens: int = 0
    is_finished: bool = False
    rounds: tuple[DraftRound, ...] = ()
    """Of traced requests only."""


@dataclass(frozen=True, slots=True)
class LookupEvent:
    """Asks the host for blocks of the store; answered by `Engine.answer_lookup`."""

    lookup_id: int
    request_id: str
    keys: tuple[bytes, ...]
    tail_key: bytes


@dataclass(frozen=True, slots=True)
class LoadedEvent:
    """The blocks of a lookup were read or are not needed: their pins can go."""

    lookup_id: int
    corrupt_keys: tuple[bytes, ...]
    num_blocks: int
    num_bytes: int
    started_s: float = 0.0
    """When reading began, by the engine's clock; 0 if nothing was read."""
    ended_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SavedEvent:
    """Blocks were written to slots and can be made readable."""

    request_id: str
    blocks: tuple[StoredBlock, ...]
    started_s: float = 0.0
    """When writing began, by the engine's clock."""


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """A request was refused or failed; `reason` is stable, lower-kebab."""

    request_id: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class LearningsEvent:
    """What drafts can be trained and judged with; at most one a step."""

    samples: tuple[Sample, ...] = ()
    outcomes: tuple[SequenceOutcome, ...] = ()
    capture_s: float = 0.0
    """Spent on capturing since the last event."""


@dataclass(frozen=True, slots=True)
class DraftsEvent:
    """What is drafted with after a change, or after one that failed."""

    state: DraftState


EngineEvent = (
    OutputEvent
    | LookupEvent
    | LoadedEvent
    | SavedEvent
    | FailedEvent
    | LearningsEvent
    | DraftsEvent
)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy the engine is."""

    num_waiting: int
    num_running: int
    pending_prefill_tokens: int
    free_blocks: int
    total_blocks: int
    context_tokens: int
    last_step_s: float
    num_preemptions: int
    num_steps: int
    num_evictions: int
    cached_blocks: int
    """That prompts can be found in, held or not."""
    speculation: SpeculationReport | None = None
    """The last report; None without speculation."""
