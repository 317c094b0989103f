"""What the engine needs from outside: a runner, drafts, and KV memory that others share.

The worker injects an implementation (kvstore.arena.ArenaView fits by shape); the engine
never learns where the bytes live or how slots are managed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from paceline.domain.cost import StepShape
from paceline.engine.request import Sequence
from paceline.engine.spec.drafter import DrafterNeeds
from paceline.engine.spec.tree import DraftTree
from paceline.engine.step import SampledToken, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one block; a stale reference is recognised by `generation`."""

    offset: int
    generation: int


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block of the store: where its bytes are and what they must hash to (xxh3-64)."""

    key: bytes
    slot: Slot
    checksum: int
    num_tokens: int
    is_request_scoped: bool = False


class BlockArena(Protocol):
    """Mapped memory with slots. Offsets are those of the slots' headers."""

    def payload(self, offset: int, length: int) -> memoryview:
        """Return the writable payload bytes of the slot at `offset`."""
        ...

    def seal(
        self,
        offset: int,
        *,
        generation: int,
        key: bytes,
        kv_root: bytes,
        length: int,
        num_tokens: int,
        is_request_scoped: bool,
    ) -> int:
        """Write the header of a filled slot and return the payload's checksum."""
        ...

    def check(
        self,
        offset: int,
        *,
        generation: int,
        key: bytes,
        kv_root: bytes,
        length: int,
        checksum: int,
        data: memoryview,
    ) -> bool:
        """Tell whether the slot still holds that block and copied `data` is what was written."""
        ...

    def close(self) -> None:
        """Unmap the memory."""
        ...


class PageMemory(Protocol):
    """Access to the bytes of the engine's own pages, one contiguous run each."""

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        ...

    def read_page(self, page: int, out: memoryview) -> None:
        """Copy a page's bytes into `out`."""
        ...

    def write_page(self, page: int, data: memoryview) -> None:
        """Overwrite a page's bytes."""
        ...

    def view_page(self, page: int) -> memoryview:
        """Return a page's bytes for hashing, valid until the next step."""
        ...


class StepRunner(PageMemory, Protocol):
    """Executes plans on tensors; engine/runner.py is the implementation."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step."""
        ...


Advance = tuple[Sequence, tuple[SampledToken, ...]]
"""A sequence that was computed, and its new tokens."""


class DraftSource(Protocol):
    """Whoever proposes tokens for a step; spec/speculator.py is the implementation."""

    @property
    def needs(self) -> DrafterNeeds:
        """What must be found out about the rows that are drawn from."""
        ...

    def draft(
        self,
        sequences: list[Sequence],
        step: StepShape,
        reserve: Callable[[Sequence, int], int],
    ) -> Mapping[int, DraftTree]:
        """Return drafts by sequence id for some of the sequences that decode in a step.

        `reserve(sequence, n)` takes pages for up to n nodes and returns how many fit; a tree
        may have no more.
        """
        ...
