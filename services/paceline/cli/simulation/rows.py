"""The decoding rows of an engine: how far each is, without touching them in every step.

All rows get the same number of tokens on average in a step. After steps that brought E in sum a
row has floor(E + r) tokens, r drawn once for it: rounded at random, right on average, and known
without drawing for every step. So one sum moves all rows on, and a heap says who ends next.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from paceline.cli.simulation.sequence import Sequence

MOST_RESIDUE = 1.0 - 1e-6
"""Bound of r: below 1, so that whole tokens per step stay whole."""
_TINY = 1e-9


class DecodingRows:
    """Sequences that get tokens in every step."""

    def __init__(self) -> None:
        self.fresh: list[Sequence] = []
        """Rows without a token from here."""
        self._rows: dict[int, Sequence] = {}
        self._ends: list[tuple[float, int, Sequence]] = []
        """Heap of what `_emitted` is when a row ends; entries of rows that left are skipped."""
        self._num_joins = 0
        self._emitted = 0.0
        """Tokens per row over all steps."""
        self._base = 0.0
        """Context of all rows is this plus `_emitted` for each."""

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._rows.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return self._rows.get(sequence.id) is sequence

    def context(self, ahead: float = 0.0) -> int:
        """Return the context of all rows, so many tokens for each later."""
        return int(self._base + len(self._rows) * (self._emitted + ahead) + 0.5)

    def until_end(self) -> float:
        """Return the tokens for each row until one ends."""
        while True:
            end, _, sequence = self._ends[0]
            if sequence in self and sequence.ends_at == end:
                return end - self._emitted
            heapq.heappop(self._ends)

    def join(self, sequence: Sequence, *, is_fresh: bool) -> None:
        """Take a sequence whose KV is here; fresh: its next token is its first from here."""
        sequence.joined = self._emitted
        sequence.computed = sequence.context
        sequence.ends_at = self._emitted + sequence.left - sequence.residue
        self._rows[sequence.id] = sequence
        self._base += sequence.context - self._emitted
        self._num_joins += 1
        heapq.heappush(self._ends, (sequence.ends_at, self._num_joins, sequence))
        if is_fresh:
            self.fresh.append(sequence)

    def advance(self, tokens: float) -> None:
        """Give every row so many tokens."""
        self._emitted += tokens

    def take_ended(self) -> list[Sequence]:
        """Take those out that have all their tokens."""
        ended = []
        while self._rows and self.until_end() <= _TINY:
            sequence = heapq.heappop(self._ends)[2]
            self._leave(sequence)
            ended.append(sequence)
        return ended

    def take_out(self, sequence: Sequence) -> None:
        """Take a row out in the middle, with the tokens it has."""
        self._leave(sequence)
        progress = self._emitted - sequence.joined + sequence.residue + _TINY
        emitted = min(sequence.left - 1, int(progress))
        sequence.residue = min(max(progress - emitted, 0.0), MOST_RESIDUE)
        sequence.context += emitted
        sequence.left -= emitted
        if sequence in self.fresh:
            self.fresh.remove(sequence)

    def _leave(self, sequence: Sequence) -> None:
        del self._rows[sequence.id]
        self._base -= sequence.context - sequence.joined
        if not self._rows:
            # Sums of many differences drift.
            self._base = 0.0
