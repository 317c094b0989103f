"""Grows the trees of all sequences together: one pass of the drafting model per level.

    level 0    the tokens that the model has no KV of, one causal run per sequence
    level d    the nodes behind which candidates are wanted, in slots behind the context

               slots  [0 ....... context | level 1 | level 2 | ...)
                                           the tail: nodes in the order they were computed

A level computes its own nodes only: what they hang under lies in the tail already. A sequence
leaves the pass when its tree is grown. model.py and layer_skip.py say which model computes and
whose pages it writes to.

Shape legend: M tokens with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.engine.page_table import PageIds
from paceline.engine.sampling.noise import draft_lane
from paceline.engine.spec.candidates import candidates
from paceline.engine.spec.drafter import DraftBudget, DraftContext
from paceline.engine.spec.drafters.passes import Forward, PassLayout, Run
from paceline.engine.spec.growth import Candidates, TreeBuilder, TreeGrowth
from paceline.engine.spec.tree import EMPTY_TREE, ROOT, DraftTree
from paceline.engine.step import SampleSpec

MOST_CHILDREN = 8
"""Of a node: the ninth-best token is next to never right, and each costs a builder 3 us."""
_NOTHING = Candidates((), ())


@dataclass(frozen=True, slots=True, eq=False)
class LevelRow:
    """A sequence's part in a round."""

    context: DraftContext
    budget: DraftBudget
    start: int
    """Tokens whose KV the pages hold; fewer than the context has."""
    stop: int
    """Tokens whose KV they hold after level 0; less than the context has: no tree this time."""
    pages: PageIds
    """With room for the context and as many nodes as the budget allows, a slot each. Builders
    that drop nodes again may want more computed; what has no slot gets no children."""
    block_size: int


def grow_trees(
    rows: Sequence[LevelRow],
    layout: PassLayout,
    forward: Forward,
    builder: TreeBuilder,
    source: str,
) -> list[DraftTree]:
    """Return a tree for each row, grown by `builder` from what the model says."""
    if not rows:
        return []
    layout.set_tables([row.pages for row in rows])
    logits_MV = forward(layout.lay_out([_missing(row) for row in rows]))
    branches = {
        i: _Branch(row, builder.start(row.budget, source, is_greedy=row.context.sampling.is_greedy))
        for i, row in enumerate(rows)
        if row.stop == len(row.context.token_ids)
    }
    growing = list(branches.values())
    num_laid_out = len(rows)
    while growing:
        _expand(growing, logits_MV)
        growing = [branch for branch in growing if branch.advance()]
        if not growing:
            break
        if len(growing) < num_laid_out:
            layout.set_tables([branch.row.pages for branch in growing])
            num_laid_out = len(growing)
        logits_MV = forward(layout.lay_out([branch.run() for branch in growing]))
    return [branches[i].growth.tree() if i in branches else EMPTY_TREE for i, _ in enumerate(rows)]


def _missing(row: LevelRow) -> Run:
    """Return the run of level 0."""
    return Run(
        tokens=row.context.token_ids[row.start : row.stop],
        positions=range(row.start, row.stop),
        end=row.stop,
        num_drawn=int(row.stop == len(row.context.token_ids)),
    )


def _expand(growing: Sequence[_Branch], logits_MV: torch.Tensor) -> None:
    specs: list[SampleSpec] = []
    lanes: list[int | None] = []
    for branch in growing:
        specs += branch.specs()
        lanes += branch.lanes()
    count = min(max(branch.row.budget.nodes for branch in growing), MOST_CHILDREN)
    found = candidates(logits_MV, specs, lanes, count)
    begin = 0
    for branch in growing:
        end = begin + len(branch.computed)
        branch.expand(found[begin:end])
        begin = end


class _Branch:
    """One tree while it grows, and where its nodes lie."""

    def __init__(self, row: LevelRow, growth: TreeGrowth) -> None:
        self.row, self.growth = row, growth
        self.computed: Sequence[int] = growth.frontier()
        """Nodes of the frontier that are computed in this level."""
        assert tuple(self.computed) == (ROOT,), "a tree starts at its root"
        self._num_left_out = 0
        self._length = len(row.context.token_ids)
        self._num_slots = len(row.pages) * row.block_size - self._length
        self._entry_of: dict[int, int] = {ROOT: -1}
        """Where in the tail a node lies."""
        self._depth_of: dict[int, int] = {ROOT: 0}
        self._parents: list[int] = []
        """Of the tail."""
        self._base = base_spec(row.context)

    def expand(self, found: Sequence[Candidates]) -> None:
        """Hand on the candidates behind the nodes that were computed."""
        self.growth.expand([*found, *[_NOTHING] * self._num_left_out])

    def advance(self) -> bool:
        """Take over the next level's nodes into the tail; tell whether there are some."""
        frontier = self.growth.frontier()
        self.computed = frontier[: self._num_slots - len(self._parents)]
        self._num_left_out = len(frontier) - len(self.computed)
        if not self.computed:
            if frontier:
                self.expand(())
            return False
        for node in self.computed:
            parent = self.growth.nodes[node].parent
            self._depth_of[node] = self._depth_of[parent] + 1
            self._entry_of[node] = len(self._parents)
            self._parents.append(self._entry_of[parent])
        return True

    def run(self) -> Run:
        """Return the run that computes the level."""
        nodes, last = self.growth.nodes, self._length - 1
        return Run(
            tokens=[nodes[node].token for node in self.computed],
            positions=[last + self._depth_of[node] for node in self.computed],
            end=self._length + len(self._parents),
            parents=self._parents,
            num_drawn=len(self.computed),
        )

    def specs(self) -> list[SampleSpec]:
        """Return how the target draws behind each node of the level."""
        return [self._spec(node) for node in self.computed]

    def lanes(self) -> list[int | None]:
        """Return the noise that children of each node of the level are drawn with."""
        if self.row.context.is_coupled:
            return [None] * len(self.computed)
        return [draft_lane(node, self._depth_of[node]) for node in self.computed]

    def _spec(self, node: int) -> SampleSpec:
        base = self._base
        if node == ROOT:
            return base
        output = base.output_token_ids
        if output is not None:
            output += tuple(self._path_to(node))
        position = base.position + self._depth_of[node]
        return SampleSpec(base.sampling, base.stream, position, 0, base.prompt_token_ids, output)

    def _path_to(self, node: int) -> list[int]:
        """Return the tokens from the root's child down to a node."""
        path: list[int] = []
        while node != ROOT:
            path.append(self.growth.nodes[node].token)
            node = self.growth.nodes[node].parent
        return path[::-1]


def base_spec(context: DraftContext) -> SampleSpec:
    """Return how the target draws behind the sequence's last token."""
    tokens, has_penalties = context.token_ids, context.sampling.has_penalties
    return SampleSpec(
        sampling=context.sampling,
        stream=context.stream,
        position=len(tokens),
        num_logprobs=0,
        prompt_token_ids=tuple(tokens[: context.num_prompt]) if has_penalties else None,
        output_token_ids=tuple(tokens[context.num_prompt :]) if has_penalties else None,
    )
