"""Drafts with the target itself, some of its attentions and MLPs left out (SWIFT).

No second model and no KV but the target's: what it drafts is stored behind the context of the
sequence, in slots that the step which verifies it writes anew. Which layers are left out is
searched for while serving (skip_search.py). Xia et al. 2025, SWIFT, sections 4.1 and 4.2.

Shape legend: M tokens with logits, V vocabulary, P pages, L layers, K key/value heads, T tokens
per page, D head size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from paceline.engine.models.load import Model
from paceline.engine.page_table import PageIds
from paceline.engine.spec.drafter import DraftBudget, DraftContext, DrafterNeeds, Round
from paceline.engine.spec.drafters.levels import LevelRow, grow_trees
from paceline.engine.spec.drafters.passes import Pass, PassLayout, Run
from paceline.engine.spec.drafters.skip_search import SkipSearch, SkipSet
from paceline.engine.spec.growth import TreeBuilder
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree

_SCORED_TOKENS = 32
"""Generated tokens that a set is scored by; the paper takes 32 to 50."""


class TargetAccess(Protocol):
    """What the speculator lends of the engine."""

    @property
    def model(self) -> Model:
        """The target."""
        ...

    @property
    def kv_PL2KTD(self) -> torch.Tensor:
        """Its KV."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens per page."""
        ...

    @property
    def max_context_tokens(self) -> int:
        """Positions that the model was loaded for."""
        ...

    def pages_of(self, sequence_id: int) -> PageIds:
        """Return a sequence's pages, in order.

        They hold the KV of all tokens but the last one. Slots from that one on are nobody
        else's and may be written; there is no tree where they are too few for its nodes.
        """
        ...

    def lend_pages(self, count: int) -> Sequence[int]:
        """Return pages to write to until the caller returns, that nobody else reads or writes.

        Empty where so many are not free, or where there is no time for a trial now.
        """
        ...


class LayerSkipDrafter:
    """The target without some of its layers, and the search for which."""

    name = "layer-skip"
    version = ""
    needs = DrafterNeeds()
    state_bytes = 0
    state_entries = 0

    def __init__(
        self,
        target: TargetAccess,
        *,
        builder: TreeBuilder,
        skip: SkipSet | None = None,
        tune_every_rounds: int = 8,
        seed: int = 0,
    ) -> None:
        """Draft with a target.

        Args:
            target: what is lent of the engine.
            builder: the shape of trees.
            skip: what to leave out at first; every second layer by default.
            tune_every_rounds: a trial of another set after so many; 0 for none.
            seed: of the search.

        Raises:
            UnsupportedModelError: the model has no layer that can be left out.
        """
        num_layers = target.model.config.num_layers
        self.search = SkipSearch(num_layers, random.Random(seed), first=skip)
        self._target = target
        self._builder = builder
        self._layout = PassLayout(target.block_size)
        self._tune_every_rounds = tune_every_rounds
        self._num_rounds = 0

    @torch.inference_mode()
    def propose(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> list[DraftTree]:
        """Return a tree for each sequence; an empty one where its pages have no room for it."""
        rows: dict[int, LevelRow] = {}
        for i, (context, budget) in enumerate(zip(contexts, budgets, strict=True)):
            length = len(context.token_ids)
            pages = self._target.pages_of(context.sequence_id)
            size = self._target.block_size
            has_room = length + budget.nodes <= len(pages) * size
            if has_room and length + budget.depth - 1 <= self._target.max_context_tokens:
                rows[i] = LevelRow(context, budget, length - 1, length, pages, size)
        trees = grow_trees(
            list(rows.values()),
            self._layout,
            self._forward,
            self._builder,
            self.name,
        )
        grown = dict(zip(rows, trees, strict=True))
        return [grown.get(i, EMPTY_TREE) for i, _ in enumerate(contexts)]

    def observe(self, rounds: Sequence[Round]) -> None:
        """Try another set every so many rounds, on a sequence that has generated enough."""
        before, self._num_rounds = self._num_rounds, self._num_rounds + len(rounds)
        every = self._tune_every_rounds
        if every and before // every != self._num_rounds // every:
            context = max(
                (done.context for done in rounds),
                key=lambda context: len(context.token_ids) - context.num_prompt,
            )
            self.tune(context)

    def forget(self, sequence_id: int) -> None:
        """Do nothing: the pages are the engine's."""

    @torch.inference_mode()
    def tune(self, context: DraftContext) -> bool:
        """Compare another set with the best one by what a sequence generated last.

        Two passes over some forty tokens. Returns whether it was done: not where the search has
        ended, the sequence is too short, or nothing is lent.
        """
        length, size = len(context.token_ids), self._target.block_size
        if self.search.is_done or length - context.num_prompt < _SCORED_TOKENS:
            return False
        # Whole pages from here on are lent ones: the target's own KV must stay what it is.
        #   [0 ...... begin)  [begin ............ length - 1)   | last token
        #   its own pages     lent pages, computed               only compared with
        begin = (length - 1 - _SCORED_TOKENS) // size * size
        lent = self._target.lend_pages(-(-(length - 1 - begin) // size))
        if not lent:
            return False
        own = self._target.pages_of(context.sequence_id)[: begin // size]
        self._layout.set_tables([np.concatenate([own, np.array(lent, dtype=np.int32)])])
        run = Run(
            tokens=context.token_ids[begin : length - 1],
            positions=range(begin, length - 1),
            end=length - 1,
            num_drawn=_SCORED_TOKENS,
        )
        batch = self._layout.lay_out([run])
        emitted = torch.tensor(context.token_ids[length - _SCORED_TOKENS : length])

        def matchness(skip: SkipSet) -> float:
            predicted = self._compute(batch, skip).argmax(dim=-1)
            return float((predicted == emitted).double().mean())

        self.search.try_one(matchness)
        return True

    def _forward(self, batch: Pass) -> torch.Tensor:
        return self._compute(batch, self.search.best)

    def _compute(self, batch: Pass, skip: SkipSet) -> torch.Tensor:
        target = self._target
        x_NE = target.model.forward(
            batch.tokens_N,
            batch.positions_N,
            target.kv_PL2KTD,
            batch.slots_N,
            batch.attention,
            skip=skip,
        )
        return target.model.logits(x_NE, batch.drawn_M)


def make(
    *,
    target: TargetAccess,
    builder: TreeBuilder,
    tune_every_rounds: int = 8,
    seed: int = 0,
) -> LayerSkipDrafter:
    """Return a drafter over the target.

    Raises:
        UnsupportedModelError: the model has no layer that can be left out.
    """
    return LayerSkipDrafter(
        target,
        builder=builder,
        tune_every_rounds=tune_every_rounds,
        seed=seed,
    )
