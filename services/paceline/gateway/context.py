"""What the pipeline knows of one request; each field says which step fills it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from paceline.domain.errors import DeadlineError
from paceline.domain.member import Member, ModelCard
from paceline.domain.request import FinishReason, GenerationSpec
from paceline.v1 import inference_pb2


@dataclass(slots=True)
class Output:
    """One of the n outputs, as far as the client has it."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    target_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    draft_version: str = ""
    finish_reason: FinishReason | None = None
    first_token_s: float | None = None
    """Seconds from arrival."""


@dataclass(slots=True)
class RequestContext:
    """One Generate call on its way through the steps."""

    request: inference_pb2.GenerateRequest
    request_id: str
    """The client's id, or a drawn one: in logs and in the metadata of every call."""
    arrival_s: float
    """Monotonic time."""
    deadline_s: float
    """Monotonic time by which the call must end."""
    tenant: str = ""
    """authenticate"""
    may_train: bool = True
    """authenticate: whether the tenant lets its text train drafts"""
    model: ModelCard | None = None
    """validate: what the fleet serves under the requested name"""
    spec: GenerationSpec | None = None
    """tokenise: the request in tokens, under an id unique in the fleet"""
    outputs: list[Output] = field(default_factory=list)
    """tokenise makes them, respond fills them"""
    holders: dict[str, int] = field(default_factory=dict)
    """lookup: KV node id -> leading blocks it holds"""
    prefill_worker: Member | None = None
    """route: None lets the decode worker compute the prompt"""
    decode_worker: Member | None = None
    """route"""
    predicted_ttft_s: float = 0.0
    """route: of the chosen workers"""
    cached_tokens: int = 0
    """prefill, decode: prompt tokens that nobody had to compute"""
    computed_by: str = ""
    """prefill, decode: worker that computed the prompt"""
    migrations: int = 0
    """decode"""

    @property
    def is_finished(self) -> bool:
        """Whether every output ended."""
        return bool(self.outputs) and all(o.finish_reason is not None for o in self.outputs)

    @property
    def num_output_tokens(self) -> int:
        """Tokens the client has."""
        return sum(len(o.token_ids) for o in self.outputs)

    @property
    def longest_output(self) -> int:
        """Tokens of the output that has most."""
        return max((len(o.token_ids) for o in self.outputs), default=0)

    def note_cached(self, num_tokens: int) -> None:
        """Fill `cached_tokens` with what a worker reports."""
        self.cached_tokens = min(num_tokens, len(self.tokens().prompt_token_ids))

    def card(self) -> ModelCard:
        """Return the model, known behind the validate step."""
        assert self.model is not None
        return self.model

    def tokens(self) -> GenerationSpec:
        """Return the request in tokens, known behind the tokenise step."""
        assert self.spec is not None
        return self.spec

    def remaining_s(self) -> float:
        """Return the seconds left for a call to somebody else.

        Raises:
            DeadlineError: there are none.
        """
        left = self.deadline_s - time.monotonic()
        if left <= 0:
            raise DeadlineError("the deadline passed")
        return left
