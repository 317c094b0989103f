"""Drafts with a small model of the target's vocabulary, over paged KV of its own.

What was drafted is not kept: the tokens that were accepted are computed again by the next
round's first pass, together with the one behind them, which costs about what that one costs
alone, and no KV has to be moved. levels.py grows the trees, draft_pages.py holds the pages.

Shape legend: M tokens with logits, V vocabulary, P pages, L layers, K key/value heads, T tokens
per page, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline.domain.drafts import MODEL_DRAFTER
from paceline.engine import kernels
from paceline.engine.models.config import load_model_config
from paceline.engine.models.load import KV_DTYPES, Model, ModelOptions, load_model
from paceline.engine.spec.drafter import NO_NEEDS, DraftBudget, DraftContext, Round
from paceline.engine.spec.drafters.draft_kv import DraftKv, KvShape
from paceline.engine.spec.drafters.draft_pages import DraftPages
from paceline.engine.spec.drafters.levels import LevelRow, grow_trees
from paceline.engine.spec.drafters.passes import Pass, PassLayout
from paceline.engine.spec.drafters.vocabulary import check_same_vocabulary
from paceline.engine.spec.growth import TreeBuilder
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree
from paceline.engine.weights import model_digest

_VERSION_DIGITS = 12


@dataclass(frozen=True, slots=True)
class DraftModelOptions:
    """How a draft model computes."""

    weight_format: str = "bf16"
    """"f32", "bf16" or "int8"; also decides about the KV, as for the target."""
    kv_memory_mb: int = 64
    """MiB of KV for all sequences."""
    block_size: int = 16
    """Tokens per page."""
    threads: int = 1
    """Two make a level of 1 M parameters slower: 100 us instead of 70."""
    catch_up_tokens: int = 512
    """Tokens computed at most before the first level of a call, so that no step waits long for
    a prompt that the draft model has not seen."""
    keeps_kv: bool = True
    """Whether a sequence whose version leaves goes on with the KV of that version, if the next
    one's has the same shape, or has it computed again."""


@dataclass(frozen=True, slots=True, eq=False)
class DraftModel:
    """Weights to draft with, and what they are called."""

    model: Model
    version: str
    kv_dtype: torch.dtype
    block_size: int
    max_context_tokens: int

    @property
    def kv_shape(self) -> KvShape:
        """Shape of its KV."""
        return KvShape.of(self.model.config, self.block_size, self.kv_dtype)


def load_draft_model(
    directory: Path,
    target: Path,
    options: DraftModelOptions = DraftModelOptions(),
    version: str | None = None,
) -> DraftModel:
    """Load a checkpoint that is to draft for a target's.

    Args:
        directory: the draft model's checkpoint.
        target: the target's.
        options: how it computes.
        version: its name; the first digits of its digest by default.

    Raises:
        UnsupportedModelError: it cannot be loaded, or has another vocabulary than the target.
    """
    if options.weight_format not in KV_DTYPES:
        raise ValueError(f"weight_format {options.weight_format!r}: one of {sorted(KV_DTYPES)}")
    config = load_model_config(directory)
    check_same_vocabulary(directory, config, target, load_model_config(target))
    model_options = ModelOptions(
        options.weight_format, options.block_size, config.max_context_tokens, options.threads
    )
    threads = kernels.threads()
    try:
        model = load_model(directory, config, model_options)
    finally:
        # The target's sampling goes on with as many as before.
        kernels.set_threads(threads)
    return DraftModel(
        model=model,
        version=version or model_digest(directory)[:_VERSION_DIGITS],
        kv_dtype=KV_DTYPES[options.weight_format],
        block_size=options.block_size,
        max_context_tokens=config.max_context_tokens,
    )


class ModelDrafter:
    """A model that drafts, and the pages in which it remembers sequences."""

    needs = NO_NEEDS

    def __init__(
        self,
        draft: DraftModel,
        kv: DraftKv,
        *,
        builder: TreeBuilder,
        name: str = MODEL_DRAFTER,
        catch_up_tokens: int = 512,
    ) -> None:
        """Draft with a model; `kv` is of its shape, and may be shared with models like it."""
        self.name = name
        self.draft, self.kv = draft, kv
        self._builder = builder
        self._catch_up_tokens = catch_up_tokens
        self._layout = PassLayout(draft.block_size)

    @property
    def version(self) -> str:
        """Version of the weights."""
        return self.draft.version

    @property
    def pages(self) -> DraftPages:
        """Who holds which page."""
        return self.kv.pages

    @property
    def state_bytes(self) -> int:
        """Memory of the KV that sequences hold."""
        return self.kv.num_held_bytes

    @property
    def state_entries(self) -> int:
        """Pages that sequences hold."""
        return self.kv.num_held_pages

    def pending_tokens(self, context: DraftContext) -> int:
        """Return how many tokens the next round computes before it can draft: at least 1.

        More than `catch_up_tokens` take several rounds, the last of which brings a tree.
        """
        length = len(context.token_ids)
        return length - min(self.pages.num_computed(context.sequence_id), length - 1)

    @torch.inference_mode()
    def propose(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> list[DraftTree]:
        """Return a tree for each sequence.

        An empty one for a sequence that the model has not caught up with, that is longer than
        its context, or for which there are no pages.
        """
        rows = self._admit(contexts, budgets)
        trees = grow_trees(
            list(rows.values()),
            self._layout,
            self._forward,
            self._builder,
            self.name,
        )
        for row in rows.values():
            self.pages.set_computed(row.context.sequence_id, row.stop)
        grown = dict(zip(rows, trees, strict=True))
        return [grown.get(i, EMPTY_TREE) for i, _ in enumerate(contexts)]

    def observe(self, rounds: Sequence[Round]) -> None:
        """Do nothing: the weights learn elsewhere."""

    def forget(self, sequence_id: int) -> None:
        """Free a sequence's pages."""
        self.pages.forget(sequence_id)

    def _admit(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> dict[int, LevelRow]:
        """Return who computes what, by position in `contexts`.

        Those that miss least come first: most sequences miss what was accepted last, and a long
        prompt takes what they leave of the limit.
        """
        pending = [self.pending_tokens(context) for context in contexts]
        rows: dict[int, LevelRow] = {}
        admitted: set[int] = set()
        left = self._catch_up_tokens
        for i in sorted(range(len(contexts)), key=pending.__getitem__):
            if left == 0:
                break
            row = self._row(contexts[i], budgets[i], left, admitted)
            if row is not None:
                rows[i] = row
                admitted.add(contexts[i].sequence_id)
                left -= row.stop - row.start
        return rows

    def _row(
        self, context: DraftContext, budget: DraftBudget, most_tokens: int, admitted: set[int]
    ) -> LevelRow | None:
        length = len(context.token_ids)
        # The last nodes of a tree are not computed, so paths may end one behind the context.
        if length + budget.depth - 1 > self.draft.max_context_tokens:
            return None
        # Shapes that drop nodes again compute more than they keep.
        num_slots = length + 2 * budget.nodes
        pages = self.pages.reserve(context.sequence_id, num_slots, admitted)
        if pages is None:
            return None
        # Only now: those admitted before it may have taken its pages.
        pending = self.pending_tokens(context)
        start = length - pending
        stop = start + min(pending, most_tokens)
        return LevelRow(context, budget, start, stop, pages.ids, self.draft.block_size)

    def _forward(self, batch: Pass) -> torch.Tensor:
        model = self.draft.model
        x_NE = model.forward(
            batch.tokens_N, batch.positions_N, self.kv.kv_PL2KTD, batch.slots_N, batch.attention
        )
        return model.logits(x_NE, batch.drawn_M)
