"""One generation request as every component sees it, free of wire types.

rpc/codec.py makes these from messages and back; gateway/steps/validate.py guarantees the
ranges stated here, so nothing behind the gateway checks them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    """Why an output ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Ranges are those of the public contract (proto/paceline/v1)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens seen so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """One request in tokens: what workers and the engine need."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 16
    cache_salt: bytes = b""
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int = 0
    n: int = 1
    priority: int = 0
    speculation: str = "AUTO"
    """"AUTO", "OFF", or the name of the one drafter to use; an engine without it uses none."""
    is_seed_drawn: bool = False
    """Whether the seed was drawn for the request and not chosen by its client: then tokens need
    only be right in distribution."""
    domain: str = ""
    """The client's label of the traffic, by which drafts are chosen and trained."""
    allow_training: bool = False
    """Whether what is generated may be captured to train drafts."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural, of the unmodified distribution) at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """New tokens of one output; `finish_reason` is set on its last chunk."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    target_steps: int = 0
    """Passes of the target model that brought the tokens."""
    drafted_tokens: int = 0
    """Tokens that were proposed for those passes."""
    accepted_tokens: int = 0
    """Proposed tokens among `token_ids`."""
    draft_version: str = ""
    """Version of the draft model that proposed last, if one did."""
