"""What passes between scheduler and runner: one frozen plan down, one frozen result up.

The scheduler holds no tensors, the runner no queues; these values are all they share.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.domain.request import SamplingParams, TokenLogprobs
from paceline.engine.page_table import PageIds


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How the next token of a row is drawn.

    `stream` is the output's index and `position` the number of tokens before the drawn one;
    with the seed they key its noise, so that it does not depend on the batch.
    """

    sampling: SamplingParams
    stream: int
    position: int
    num_logprobs: int
    prompt_token_ids: tuple[int, ...] | None = None
    output_token_ids: tuple[int, ...] | None = None
    """Both set only where penalties need them."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A run of tokens of one sequence, computed in this step.

    [0 ........ start) in KV already   [start ... start+len(token_ids)) computed now
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    start: int
    pages: PageIds
    """A view of the sequence's page table; read only."""
    sample: SampleSpec | None = None
    """Set where the row's last logits are drawn from."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One iteration: page copies first, then all rows in one pass."""

    rows: tuple[Row, ...]
    page_copies: tuple[tuple[int, int], ...] = ()
    """(source, destination) pages; each destination belongs to one of the rows."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token drawn for a row."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner brought back: one entry per row, None where nothing was drawn."""

    sampled: tuple[SampledToken | None, ...]
    elapsed_s: float
    failed_rows: frozenset[int] = frozenset()
    """Positions of rows whose numbers are not finite; what they computed must not be used."""
