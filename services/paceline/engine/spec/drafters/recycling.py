"""Proposes the target's own next-best tokens of earlier steps (Token Recycling).

arXiv 2408.08696: a matrix holds for every token the 8 likeliest successors that the target
named when it last computed that token, wherever that was, in rejected nodes of drafts too; a
draft follows them from token to token by lookup. Differences: one matrix per tenant, as rows
tell what the tenant's text was about; rows only of tokens that occurred; and the tree is not
fixed: how often the successor of a rank was right is counted, apart for rows that keep saying
the same, and the best tree for those rates is grown.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from paceline.engine.spec.calibration import Calibration
from paceline.engine.spec.drafter import DraftBudget, DraftContext, DrafterNeeds, Round
from paceline.engine.spec.drafters.best_first import grow
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree

NUM_SUCCESSORS = 8
_ROW_BYTES = 256
"""Measured with tracemalloc: the array (112), its place in the ordered dictionary, the token."""
_STEADY = 3
"""Times in a row that a first successor is seen again after which a row counts as steady."""
_PRIOR = tuple(0.4 * 0.5**rank for rank in range(NUM_SUCCESSORS))
"""Rates of ranks before any was counted; the order of magnitude is all that matters."""
_PRIOR_WEIGHT = 8.0
_DECAY = 0.999
"""What is left of a count after each further token of its kind: a memory of some 1000."""

Matrix = OrderedDict[int, "array[int]"]
"""Token -> its successors, best first, and behind them how steady the row is."""

_Known = tuple[int, tuple[int, ...]]
"""What is known at a node: its token, and its path of ranks if the tree has a given shape."""


class _Ranks:
    """How often the successor of each rank was the next token. Counts only, no text."""

    __slots__ = ("hits", "tried")

    def __init__(self) -> None:
        self.hits = [0.0] * NUM_SUCCESSORS
        self.tried = 0.0

    def add(self, rank: int | None) -> None:
        """Count a token and the rank it had, if any."""
        self.tried = self.tried * _DECAY + 1.0
        self.hits = [hits * _DECAY for hits in self.hits]
        if rank is not None:
            self.hits[rank] += 1.0

    def rates(self) -> list[float]:
        """Return the share of tokens by rank."""
        return [
            (hits + _PRIOR_WEIGHT * prior) / (self.tried + _PRIOR_WEIGHT)
            for hits, prior in zip(self.hits, _PRIOR, strict=True)
        ]


class RecyclingDrafter:
    """Drafts by lookup of successors. Holds at most `max_bytes` of them."""

    name = "recycling"
    version = ""
    needs = DrafterNeeds(successors=NUM_SUCCESSORS)

    def __init__(
        self,
        max_bytes: int = 32 << 20,
        tenant_bytes: int = 8 << 20,
        tenants: int = 1024,
        shape: Iterable[tuple[int, ...]] | None = None,
    ) -> None:
        """Start empty.

        Args:
            max_bytes: memory for all matrices; the tenant used least recently goes first.
            tenant_bytes: memory for one; its rows written least recently go first.
            tenants: most tenants known.
            shape: nodes of the tree as paths of ranks, (0, 2) being the third successor of the
                first one of the root (the paper's static tree); None grows it by rates.
        """
        self._max_rows = max_bytes // _ROW_BYTES
        self._tenant_rows = tenant_bytes // _ROW_BYTES
        if not 1 <= self._tenant_rows <= self._max_rows or tenants < 1:
            raise ValueError("a tenant and all of them need falling shares of memory")
        self._max_tenants = tenants
        self._shape = None if shape is None else frozenset(shape)
        self._matrices: OrderedDict[bytes, Matrix] = OrderedDict()
        self._num_rows = 0
        self._ranks = [_Ranks() for _ in range(_STEADY + 1)]

    @property
    def state_bytes(self) -> int:
        """Memory of the rows held, about."""
        return self._num_rows * _ROW_BYTES

    @property
    def state_entries(self) -> int:
        """Rows held for all tenants."""
        return self._num_rows

    @property
    def num_rows(self) -> int:
        """Rows held for all tenants."""
        return self._num_rows

    def propose(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> list[DraftTree]:
        """Return for each sequence the best tree of successors of successors."""
        confidences = [ranks.rates() for ranks in self._ranks]
        rates: list[list[float]] = []
        calibration: Calibration | None = None
        trees = []
        for context, budget in zip(contexts, budgets, strict=True):
            if budget.calibration is not calibration:
                calibration = budget.calibration
                rates = [[calibration.rate(c) for c in row] for row in confidences]
            trees.append(self._draft(context, budget, confidences, rates))
        return trees

    def observe(self, rounds: Sequence[Round]) -> None:
        """Take over the successors at every input position of a step; of one token, the last."""
        for r in rounds:
            if r.successors is None:
                continue
            matrix = self._touch(r.context.tenant)
            root = r.context.token_ids[-1 - len(r.emitted)]
            self._count_ranks(matrix, (root, *r.emitted))
            before = len(matrix)
            for token, successors in zip((root, *r.tree.tokens), r.successors, strict=True):
                _write(matrix, token, successors)
            while len(matrix) > self._tenant_rows:
                matrix.popitem(last=False)
            self._num_rows += len(matrix) - before
            while self._num_rows > self._max_rows:
                self._evict_tenant()

    def forget(self, sequence_id: int) -> None:
        """Nothing is kept for a sequence."""

    def _draft(
        self,
        context: DraftContext,
        budget: DraftBudget,
        confidences: list[list[float]],
        rates: list[list[float]],
    ) -> DraftTree:
        matrix = self._matrices.get(context.tenant)
        if matrix is None:
            return EMPTY_TREE
        self._matrices.move_to_end(context.tenant)
        shape = self._shape

        def children(known: _Known) -> Iterable[tuple[int, float, float, _Known]]:
            token, path = known
            row = matrix.get(token)
            if row is None:
                return ()
            kind = row[-1]
            tried = zip(row[:-1], confidences[kind], rates[kind], strict=False)
            if shape is None:
                return [(child, c, rate, (child, path)) for child, c, rate in tried]
            return [
                (child, c, rate, (child, (*path, rank)))
                for rank, (child, c, rate) in enumerate(tried)
                if (*path, rank) in shape
            ]

        root: _Known = (context.token_ids[-1], ())
        return grow(budget, self.name, root, children)

    def _count_ranks(self, matrix: Matrix, tokens: Sequence[int]) -> None:
        for token, following in pairwise(tokens):
            row = matrix.get(token)
            if row is not None:
                successors = row[:-1].tolist()
                rank = successors.index(following) if following in successors else None
                self._ranks[row[-1]].add(rank)

    def _touch(self, name: bytes) -> Matrix:
        matrix = self._matrices.get(name)
        if matrix is None:
            matrix = self._matrices[name] = OrderedDict()
            if len(self._matrices) > self._max_tenants:
                self._evict_tenant()
        else:
            self._matrices.move_to_end(name)
        return matrix

    def _evict_tenant(self) -> None:
        _, matrix = self._matrices.popitem(last=False)
        self._num_rows -= len(matrix)


def _write(matrix: Matrix, token: int, successors: Sequence[int]) -> None:
    """Replace a token's row; it becomes the newest."""
    row = array("i", successors[:NUM_SUCCESSORS])
    old = matrix.pop(token, None)
    is_same = old is not None and old[0] == row[0]
    row.append(min(_STEADY, old[-1] + 1) if old is not None and is_same else 0)
    matrix[token] = row
