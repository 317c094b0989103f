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
class CaptureNeeds:
    """What is recorded of a step's rows, to train drafts with."""

    sequence_ids: frozenset[int] = frozenset()
    """Whose rows; all of them are drawn from."""
    top: int = 0
    """How many of the likeliest tokens are named at each place."""
    hidden: bool = False
    """Whether final hidden states are recorded, too."""


NO_CAPTURE = CaptureNeeds()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One iteration: page copies first, then all rows in one pass."""

    rows: tuple[Row, ...]
    page_copies: tuple[tuple[int, int], ...] = ()
    """(source, destination) pages; each destination belongs to one of the rows."""
    wanted: DrafterNeeds = NO_NEEDS
    """What drafters want to be told about the rows that are drawn from."""
    captured: CaptureNeeds = NO_CAPTURE

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
class Captured:
    """The distributions that a row's tokens were drawn from; arrays as in a `Sample`."""

    num_tokens: int
    """N, as many as the row brought."""
    top_ids: bytes
    """int32 [N][K]"""
    top_probs: bytes
    """float16 [N][K]"""
    tail_mass: bytes
    """float16 [N]"""
    hidden: bytes = b""
    """float16 [N][E], if wanted."""

    def first(self, count: int) -> Captured:
        """Return those of the first `count` tokens."""
        if count == self.num_tokens:
            return self
        arrays = (self.top_ids, self.top_probs, self.tail_mass, self.hidden)
        return Captured(count, *[x[: len(x) // self.num_tokens * count] for x in arrays])


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
    captured: Captured | None = None
    """Set where the plan asks for it and the row brought tokens."""


NOTHING = RowResult()


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What the runner brought back, row for row."""

    rows: tuple[RowResult, ...]
    elapsed_s: float
    failed_rows: frozenset[int] = frozenset()
    """Positions of rows whose numbers are not finite; what they computed must not be used."""
    capture_s: float = 0.0
    """Processor time that recording for `captured` took."""
