"""Lays out one pass of a drafting model over paged KV: runs of tokens in, tensors out.

levels.py says which runs; nothing here knows what a draft is.

Shape legend: N tokens of the pass, R runs, M tokens with logits, B pages per run, T tokens per
page, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from paceline.engine.kernels import AttentionBatch
from paceline.engine.page_table import PageIds


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens of one sequence, in the slots up to `end` of its pages.

    slots  [0 ............ end - len(tokens) | tokens | end)
           the last len(parents) of them may be a tree, see AttentionBatch
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    end: int
    parents: Sequence[int] = ()
    """Of the tree's tokens, those of earlier passes included; empty where the run is causal."""
    num_drawn: int = 1
    """How many of the tokens, the last ones, have logits."""


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What a model is given."""

    tokens_N: torch.Tensor
    positions_N: torch.Tensor
    slots_N: torch.Tensor
    attention: AttentionBatch
    drawn_M: torch.Tensor


Forward = Callable[[Pass], torch.Tensor]
"""Computes a pass, stores its KV, returns float32 logits [M, V]."""


class PassLayout:
    """Turns runs into tensors."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._pages: tuple[PageIds, ...] = ()
        self._tables_RB = torch.zeros(0, 0, dtype=torch.int32)

    def set_tables(self, pages: Sequence[PageIds]) -> None:
        """Take over the page tables of the runs that follow, one each."""
        width = max((len(ids) for ids in pages), default=0)
        tables_RB = np.zeros((len(pages), width), dtype=np.int32)
        for row_B, ids in zip(tables_RB, pages, strict=True):
            row_B[: len(ids)] = ids
        self._pages = tuple(pages)
        self._tables_RB = torch.from_numpy(tables_RB)

    def lay_out(self, runs: Sequence[Run]) -> Pass:
        """Return the pass that computes one run for each page table."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        drawn: list[int] = []
        parents: list[int] = []
        cu_q, kv_lens, cu_tree = [0], [], [0]
        size, longest = self._block_size, 0
        for run, ids in zip(runs, self._pages, strict=True):
            count = len(run.tokens)
            tokens += run.tokens
            positions += run.positions
            places = range(run.end - count, run.end)
            slots += [int(ids[i // size]) * size + i % size for i in places]
            drawn += range(len(tokens) - run.num_drawn, len(tokens))
            parents += run.parents
            cu_q.append(len(tokens))
            kv_lens.append(run.end)
            cu_tree.append(len(parents))
            longest = max(longest, count)
        attention = AttentionBatch(
            cu_q=_ints(cu_q),
            kv_lens=_ints(kv_lens),
            block_tables=self._tables_RB,
            block_size=size,
            max_q=longest,
            cu_tree=_ints(cu_tree) if parents else None,
            tree_parents=_ints(parents) if parents else None,
        )
        return Pass(_longs(tokens), _longs(positions), _longs(slots), attention, _longs(drawn))


# By way of numpy: 1 us a tensor, where torch.tensor takes 3 and a view of a kept one 2.
def _longs(values: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _ints(values: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int32))
