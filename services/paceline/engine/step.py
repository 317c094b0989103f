"""What passes between scheduler and runner: one frozen plan down, one frozen result up.

The scheduler holds no tensors, the runner no queues; these values are all they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.domain.request import SamplingParams, TokenLogprobs
from paceline.engine.page_table import PageIds
from paceline.engine.spec.drafter import NO_NEEDS, DrafterNeeds
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree

if TYPE_CHECKING:
    import torch


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
    """A run of tokens of one sequence, computed in this step, and a draft behind its last one.

    [0 .... start) in KV already   [start .. start+len(token_ids)) [nodes of the tree) computed now
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    start: int
    pages: PageIds
    """A view of the sequence's page table; read only."""
    sample: SampleSpec | None = None
    """Set where the row's last logits are drawn from."""
    tree: DraftTree = EMPTY_TREE
    """Draft under the row's last token; its KV goes to the slots behind, node after node."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed, nodes of the draft included."""
        return len(self.token_ids) + len(self.tree)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One iteration: page copies first, then all rows in one pass."""

    rows: tuple[Row, ...]
    page_copies: tuple[tuple[int, int], ...] = ()
    """(source, destination) pages; each destination belongs to one of the rows."""
    wanted: DrafterNeeds = NO_NEEDS
    """What drafters want to be told about the rows that are drawn from."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token drawn for a row."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RowResult:
    """What a row brought; nothing where it was not drawn from."""

    tokens: tuple[SampledToken, ...] = ()
    """The accepted path's tokens and the one behind it."""
    path: tuple[int, ...] = ()
    """Accepted nodes; their KV is in place behind the row's own tokens."""
    successors: Sequence[Sequence[int]] | None = None
    """Likeliest next tokens at the row's last token and at every node, if wanted."""
    hidden_E: torch.Tensor | None = None
    """Final hidden state behind which the last token was drawn, if wanted."""


NOTHING = RowResult()


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What the runner brought back, row for row."""

    rows: tuple[RowResult, ...]
    elapsed_s: float
    failed_rows: frozenset[int] = frozenset()
    """Positions of rows whose numbers are not finite; what they computed must not be used."""
