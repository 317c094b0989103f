"""Who holds which page of a draft model's own KV, and how much of it is computed.

    pool   [ held by sequences, least recently used first | free ]

A sequence that is short of pages takes those of sequences that are not being drafted for; what
these lose is computed again when they are drafted for next. model.py calls this file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from paceline.engine.page_table import PageTable


@dataclass(slots=True)
class _Held:
    num_computed: int = 0
    pages: PageTable = field(default_factory=PageTable)


class DraftPages:
    """A pool of pages with an owner each."""

    def __init__(self, num_pages: int, block_size: int) -> None:
        self.num_pages = num_pages
        self._block_size = block_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self.num_evictions = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def num_computed(self, sequence_id: int) -> int:
        """Return of how many tokens of a sequence, its first ones, its pages hold the KV."""
        held = self._held.get(sequence_id)
        return 0 if held is None else held.num_computed

    def reserve(
        self, sequence_id: int, num_slots: int, is_kept: Collection[int]
    ) -> PageTable | None:
        """Return a sequence's pages with room for so many tokens, or None if there is none.

        Args:
            sequence_id: whose pages.
            num_slots: tokens there must be room for.
            is_kept: sequences whose pages must stay theirs.
        """
        held = self._held.get(sequence_id)
        missing = -(-num_slots // self._block_size) - (0 if held is None else len(held.pages))
        if missing > len(self._free) and not self._evict(missing, {sequence_id, *is_kept}):
            return None
        if held is None:
            held = self._held[sequence_id] = _Held()
        for _ in range(missing):
            held.pages.append(self._free.pop())
        self._held.move_to_end(sequence_id)
        return held.pages

    def set_computed(self, sequence_id: int, num_tokens: int) -> None:
        """Note that a sequence's pages hold the KV of its first so many tokens."""
        self._held[sequence_id].num_computed = num_tokens

    def _evict(self, missing: int, is_kept: Collection[int]) -> bool:
        """Free at least so many pages, or none if there are not as many to be had."""
        idle = [i for i in self._held if i not in is_kept]
        if missing > len(self._free) + sum(len(self._held[i].pages) for i in idle):
            return False
        for victim in idle:
            if missing <= len(self._free):
                break
            self.forget(victim)
            self.num_evictions += 1
        return True

    def forget(self, sequence_id: int) -> None:
        """Free a sequence's pages; unknown ones are ignored."""
        held = self._held.pop(sequence_id, None)
        if held is not None:
            self._free.extend(held.pages)

    def clear(self) -> None:
        """Free all pages."""
        for sequence_id in list(self._held):
            self.forget(sequence_id)
