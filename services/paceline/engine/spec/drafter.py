"""The contract of a drafter, and the values that pass between it and the speculator.

A drafter may be wrong as often as it likes: what it proposes never changes what is emitted,
only how fast. drafters/__init__.py has the table of them; a new one is one file and one line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from paceline.domain.request import SamplingParams
from paceline.engine.spec.calibration import Calibration
from paceline.engine.spec.tree import DraftTree

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class DraftContext:
    """A sequence as a drafter sees it. Read only."""

    sequence_id: int
    tenant: bytes
    """Whose text it is: nothing of it may reach the drafts of another tenant."""
    token_ids: Sequence[int]
    """Prompt and output; the last one is the root of the tree. Grows between rounds."""
    num_prompt: int
    sampling: SamplingParams
    stream: int
    """Index of the output; with the seed and a position it keys the noise of a draw."""
    is_coupled: bool = True
    """Whether a child is accepted if it is the token that the target draws with the same noise;
    else children count as drawn from their `Proposal` (recursive rejection)."""


@dataclass(frozen=True, slots=True, eq=False)
class DraftBudget:
    """How much a drafter may propose for one sequence."""

    nodes: int
    """At least 1."""
    depth: int
    """Longest path, at least 1."""
    threshold: float
    """A node of less value (probability of being accepted) is not worth its time."""
    calibration: Calibration
    """What the drafter's confidences have been worth."""
    calibration_of: Callable[[str], Calibration] | None = None
    """The same for the parts of a union, by name."""

    def within(self, nodes: int) -> DraftBudget:
        """Return the budget with no more than so many nodes."""
        return self if nodes >= self.nodes else replace(self, nodes=nodes)

    def part(self, name: str) -> DraftBudget:
        """Return the budget of a union's part."""
        if self.calibration_of is None:
            return self
        return replace(self, calibration=self.calibration_of(name))


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """What came of a draft; also reported for steps that had none (an empty tree)."""

    context: DraftContext
    """`token_ids` has the emitted tokens already."""
    tree: DraftTree
    path: tuple[int, ...]
    """Accepted nodes, from the root's child downwards."""
    emitted: tuple[int, ...]
    """Tokens of the path and the one that the target drew behind it, up to the sequence's end."""
    successors: Sequence[Sequence[int]] | None = None
    """[1 + nodes][k] the target's likeliest next tokens at the root and at every node, best
    first; if the drafter asked for them."""
    hidden_E: torch.Tensor | None = None
    """Final hidden state, normalised, of the last token whose successor was drawn; if asked for."""


@dataclass(frozen=True, slots=True)
class DrafterNeeds:
    """What a drafter wants to be told about every step."""

    successors: int = 0
    """How many of the likeliest next tokens at each position."""
    hidden: bool = False
    """The final hidden state."""


NO_NEEDS = DrafterNeeds()


@runtime_checkable
class Versioned(Protocol):
    """A drafter with several versions of its weights at a time."""

    def version_of(self, sequence_id: int) -> str:
        """Return the version that a sequence drafts with."""
        ...


class Drafter(Protocol):
    """Proposes tokens. Called by one thread, between two steps of the engine."""

    @property
    def name(self) -> str:
        """Name by which requests, metrics and options know it."""
        ...

    @property
    def version(self) -> str:
        """Version of its weights, the active one of several; empty where it has none."""
        ...

    @property
    def needs(self) -> DrafterNeeds:
        """What `observe` must be told."""
        ...

    @property
    def state_bytes(self) -> int:
        """Memory of what is kept of sequences and texts, about."""
        ...

    @property
    def state_entries(self) -> int:
        """Tokens, rows or pages that are kept, whichever the drafter counts by."""
        ...

    def propose(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> list[DraftTree]:
        """Return a tree for each sequence; an empty one where there is nothing to say."""
        ...

    def observe(self, rounds: Sequence[Round]) -> None:
        """Learn from a step. Sequences for which nothing was proposed are reported too."""
        ...

    def forget(self, sequence_id: int) -> None:
        """Let go of what was kept for a sequence; unknown ones are ignored."""
        ...
