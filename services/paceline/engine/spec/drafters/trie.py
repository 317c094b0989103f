"""Proposes what followed the same tokens before, in the sequence or in its tenant's outputs.

Lookahead (arXiv 2312.12728): a trie of windows of outputs, shared by all requests, and of the
prompt of each live one; the draft is the best part of the subtree behind the sequence's last
tokens. Differences: outputs are shared within a tenant only, the trie is read from suffixes.py
instead of being stored, and places count by the length of their match instead of by two fixed
weights. No
structure is common to two tenants, so that nothing of one can come out for another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from paceline.engine.spec.drafter import DraftBudget, DraftContext, DrafterNeeds, Round
from paceline.engine.spec.drafters.best_first import grow
from paceline.engine.spec.drafters.suffixes import LONGEST, TEXT_TOKENS, Match, SuffixIndex
from paceline.engine.spec.tree import DraftTree

_PLACES = 12
"""Places looked at in a sequence's own text, and again in its tenant's outputs."""
_DOUBT = 8.0
"""Weight of the continuation never seen: a place whose match is n tokens long weighs n * n."""
_LEARN_TOKENS = 32
"""Outputs join their tenant's in pieces of this many tokens, and when they end."""
_TOKEN_BYTES = 352
"""Measured with tracemalloc where tokens seldom repeat; 168 where they often do."""
_OWN = 0
"""Stream of a sequence in the index of its own."""


class _Sequence:
    """What is kept for a live sequence."""

    __slots__ = ("context", "num_indexed", "num_learned")

    def __init__(self, context: DraftContext) -> None:
        self.context = context
        self.num_indexed = 0
        self.num_learned = context.num_prompt


class _Tenant:
    """Everything that holds text of one tenant."""

    __slots__ = ("num_tokens", "outputs", "own")

    def __init__(self) -> None:
        self.outputs = SuffixIndex()
        self.own: OrderedDict[int, SuffixIndex] = OrderedDict()
        self.num_tokens = 0


class TrieDrafter:
    """Drafts by lookup. Holds at most `tokens` tokens of text, whatever it is shown."""

    name = "trie"
    version = ""
    needs = DrafterNeeds()

    def __init__(
        self,
        tokens: int = 1 << 18,
        tenant_tokens: int = 1 << 16,
        sequence_tokens: int = 1 << 13,
        tenants: int = 1024,
    ) -> None:
        """Start empty.

        Args:
            tokens: most tokens held, of 0.2 to 0.35 KB each; the tenant used least recently
                goes first.
            tenant_tokens: most tokens of one tenant; its oldest outputs go first, down to half
                of this, then the sequences used least recently.
            sequence_tokens: most tokens of a live sequence, the last ones, in its own index.
            tenants: most tenants known.
        """
        if not TEXT_TOKENS <= sequence_tokens <= tenant_tokens // 2 <= tokens // 2 or tenants < 1:
            raise ValueError(
                f"of {tokens} tokens a tenant must not have more, nor a sequence more than half "
                f"of its tenant's {tenant_tokens}, and at least {TEXT_TOKENS}"
            )
        self._tokens = tokens
        self._tenant_tokens = tenant_tokens
        self._sequence_tokens = sequence_tokens
        self._max_tenants = tenants
        self._tenants: OrderedDict[bytes, _Tenant] = OrderedDict()
        self._sequences: dict[int, _Sequence] = {}
        self._num_tokens = 0

    @property
    def state_bytes(self) -> int:
        """Memory of the text held, about."""
        return self._num_tokens * _TOKEN_BYTES

    @property
    def state_entries(self) -> int:
        """Tokens of text held for all tenants."""
        return self._num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of text held for all tenants."""
        return self._num_tokens

    @property
    def num_sequences(self) -> int:
        """Live sequences that it knows of."""
        return len(self._sequences)

    def tenant_tokens(self, tenant: bytes) -> int:
        """Return how many tokens of text are held for a tenant."""
        found = self._tenants.get(tenant)
        return found.num_tokens if found is not None else 0

    def propose(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> list[DraftTree]:
        """Return the best continuations of each sequence's last tokens."""
        return [
            self._draft(context, budget) for context, budget in zip(contexts, budgets, strict=True)
        ]

    def observe(self, rounds: Sequence[Round]) -> None:
        """Let outputs join those of their tenant, in pieces."""
        for r in rounds:
            sequence = self._follow(r.context)
            if len(r.context.token_ids) - sequence.num_learned >= _LEARN_TOKENS:
                self._learn(sequence)

    def forget(self, sequence_id: int) -> None:
        """Learn the rest of an output and let go of the prompt."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            return
        self._learn(sequence)
        tenant = self._tenants[sequence.context.tenant]
        tenant.outputs.close(sequence_id)
        own = tenant.own.pop(sequence_id, None)
        if own is not None:
            self._account(tenant, -own.num_tokens)

    def _draft(self, context: DraftContext, budget: DraftBudget) -> DraftTree:
        sequence = self._follow(context)
        tenant = self._tenants[context.tenant]
        own = self._index(tenant, sequence)
        suffix = list(context.token_ids[-LONGEST:])
        places = own.find(suffix, _PLACES)
        places += tenant.outputs.find(suffix, _PLACES, other_than=context.sequence_id)
        return grow(budget, self.name, places, _children(budget.calibration.rate))

    def _follow(self, context: DraftContext) -> _Sequence:
        """Keep the newest view of a sequence, and its tenant from being let go of."""
        sequence = self._sequences.get(context.sequence_id)
        if sequence is None:
            sequence = self._sequences[context.sequence_id] = _Sequence(context)
        sequence.context = context
        self._touch(context.tenant)
        return sequence

    def _touch(self, name: bytes) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant()
            if len(self._tenants) > self._max_tenants:
                self._evict_tenant()
        else:
            self._tenants.move_to_end(name)
        return tenant

    def _learn(self, sequence: _Sequence) -> None:
        """Add what is new of an output to the outputs of its tenant."""
        context = sequence.context
        tenant = self._touch(context.tenant)
        new = context.token_ids[sequence.num_learned :]
        sequence.num_learned += len(new)
        before = tenant.outputs.num_tokens
        tenant.outputs.append(context.sequence_id, new[-self._sequence_tokens :])
        self._account(tenant, tenant.outputs.num_tokens - before)
        self._make_room(tenant)

    def _index(self, tenant: _Tenant, sequence: _Sequence) -> SuffixIndex:
        """Return the index of a sequence's own text, brought up to its last token."""
        context = sequence.context
        own = tenant.own.setdefault(context.sequence_id, SuffixIndex())
        tenant.own.move_to_end(context.sequence_id)
        before = own.num_tokens
        new = context.token_ids[sequence.num_indexed :]
        sequence.num_indexed += len(new)
        own.append(_OWN, new[-self._sequence_tokens :])
        while own.num_tokens > self._sequence_tokens:
            own.drop_oldest()
        self._account(tenant, own.num_tokens - before)
        self._make_room(tenant)
        return own

    def _account(self, tenant: _Tenant, more: int) -> None:
        tenant.num_tokens += more
        self._num_tokens += more

    def _make_room(self, tenant: _Tenant) -> None:
        """Keep the bounds: first the tenant's own, then that of all, at the cost of others."""
        while tenant.num_tokens > self._tenant_tokens:
            if 2 * tenant.outputs.num_tokens > self._tenant_tokens:
                before = tenant.outputs.num_tokens
                tenant.outputs.drop_oldest()
                self._account(tenant, tenant.outputs.num_tokens - before)
            else:
                # Never the one in use: it is last, and fits in this half.
                _, own = tenant.own.popitem(last=False)
                self._account(tenant, -own.num_tokens)
        while self._num_tokens > self._tokens:
            self._evict_tenant()

    def _evict_tenant(self) -> None:
        """Let go of all text of the tenant used least recently.

        Its live sequences go on from where they are, as do those that had to make room: were
        they indexed again from the start, too many would push each other out in every step.
        """
        _, tenant = self._tenants.popitem(last=False)
        self._num_tokens -= tenant.num_tokens


def _children(
    rate: Callable[[float], float],
) -> Callable[[list[Match]], list[tuple[int, float, float, list[Match]]]]:
    """Return what reads the continuations of places: tokens, their shares, places behind them.

    A place stays in the running as long as its text agrees with the path, and its match grows.
    """
    # Shares repeat, above all those of a single place.
    rates: dict[float, float] = {}

    def child(
        token: int, share: float, behind: list[Match]
    ) -> tuple[int, float, float, list[Match]]:
        known = rates.get(share)
        if known is None:
            known = rates[share] = rate(share)
        return token, share, known, behind

    def children(places: list[Match]) -> list[tuple[int, float, float, list[Match]]]:
        following: dict[int, list[Match]] = {}
        total = _DOUBT
        for tokens, at, length in places:
            if at < len(tokens):
                total += length * length
                following.setdefault(tokens[at], []).append((tokens, at + 1, length + 1))
        return [
            child(token, sum((length - 1) ** 2 for _, _, length in behind) / total, behind)
            for token, behind in following.items()
        ]

    return children
