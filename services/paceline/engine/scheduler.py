"""Decides who runs in the next step; holds queues and page tables, no tensors.

Order is (priority, arrival). Each step takes every running decode row, then prompt chunks
while the step's token budget lasts. Pages are taken as tokens need them; when the pool is
dry, the last sequence in order gives its pages back and waits again: its full blocks stay
findable in the pool and in the KV store, so that little is computed twice.
engine.py calls this file and performs what it decides.
"""

from __future__ import annotations

from paceline.domain.request import FinishReason
from paceline.engine.blocks import BlockPool
from paceline.engine.request import Phase, Request, Sequence
from paceline.engine.step import Row, SampleSpec, StepPlan, StepResult


class Scheduler:
    """Queues of sequences over one page pool."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        step_tokens: int,
        max_context_tokens: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.step_tokens = step_tokens
        self.max_context_tokens = max_context_tokens
        self.eos_token_ids = eos_token_ids
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._page_copies: list[tuple[int, int]] = []

    # -- queues ---------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by its request's order."""
        sequence.phase = Phase.WAITING
        self.waiting.append(sequence)
        self.waiting.sort(key=_order)

    def finish(self, sequence: Sequence, reason: FinishReason | None) -> None:
        """End a sequence in any phase and give its pages back."""
        if sequence.phase is Phase.FINISHED:
            return
        self._remove(sequence)
        self._release_pages(sequence)
        sequence.phase = Phase.FINISHED
        sequence.finish_reason = reason

    def can_admit(self) -> bool:
        """Whether another sequence may start running."""
        return len(self.running) < self.max_num_seqs

    def match_prefix(self, sequence: Sequence) -> int:
        """Take shared pages for the leading blocks the pool knows; return how many.

        At least one token stays to be computed, except for a leader, whose target ends
        before the token that is drawn from.
        """
        assert not sequence.pages
        limit = sequence.target if sequence.is_leader else sequence.target - 1
        keys = sequence.block_keys(limit // self.block_size, self.block_size)
        for key in keys:
            page = self.pool.find(key)
            if page is None:
                break
            sequence.pages.append(self.pool.share(page))
        sequence.num_computed = len(sequence.pages) * self.block_size
        sequence.num_registered = len(sequence.pages)
        return len(sequence.pages)

    def has_room(self, sequence: Sequence) -> bool:
        """Whether the pages that a sequence will need for its target are there now.

        One page per running sequence stays in reserve, so that a newcomer does not force a
        preemption with its first decode steps; an idle engine admits anything.
        """
        needed = self._num_blocks(sequence.target) - len(sequence.pages)
        return not self.running or self.pool.num_available >= needed + len(self.running)

    def start(self, sequence: Sequence) -> None:
        """Move a waiting sequence to the running ones."""
        self.waiting.remove(sequence)
        sequence.phase = Phase.RUNNING
        self.running.append(sequence)
        self.running.sort(key=_order)

    def register_loaded(self, sequence: Sequence) -> None:
        """Let blocks that were filled from outside serve prefix hits."""
        self._register_full_blocks(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Undo a `match_prefix` of a sequence that stays waiting."""
        self._release_pages(sequence)

    def fork(self, leader: Sequence, siblings: list[Sequence]) -> None:
        """Let siblings share the leader's prompt pages; a partial last page is copied.

            pages  [full | full | full | partial]
                    shared by all........  own copy each
        """
        num_full = leader.num_computed // self.block_size
        for sibling in siblings:
            copy = self.pool.allocate() if leader.num_computed % self.block_size else None
            is_stuck = leader.num_computed % self.block_size and copy is None
            if is_stuck or not self.can_admit():
                if copy is not None:
                    self.pool.free([copy])
                self.add(sibling)
                continue
            sibling.pages = [self.pool.share(page) for page in leader.pages[:num_full]]
            sibling.keys = list(leader.keys[:num_full])
            sibling.num_registered = min(leader.num_registered, num_full)
            sibling.num_stored = leader.num_stored
            sibling.num_computed = leader.num_computed
            if copy is not None:
                self._page_copies.append((leader.pages[num_full], copy))
                sibling.pages.append(copy)
            sibling.phase = Phase.RUNNING
            self.running.append(sibling)
        self.running.sort(key=_order)

    # -- one step -------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """Choose the rows of the next step, or None when nothing can run."""
        chosen: dict[int, tuple[Sequence, int]] = {}
        budget = self.step_tokens
        decoding = [s for s in self.running if s.num_remaining == 1]
        computing = [s for s in self.running if s.num_remaining > 1]
        for sequence in [*decoding, *computing]:
            if sequence.phase is not Phase.RUNNING or budget <= 0:
                continue
            count = min(sequence.num_remaining, budget)
            count = self._take_pages(sequence, count, chosen)
            if count > 0:
                chosen[sequence.id] = (sequence, count)
                budget -= count
        copies, self._page_copies = tuple(self._page_copies), []
        if not chosen and not copies:
            return None
        return StepPlan(tuple(self._row(s, n) for s, n in chosen.values()), copies)

    def commit(
        self, plan: StepPlan, result: StepResult
    ) -> list[tuple[Sequence, int | None]]:
        """Book a step: advance the rows' sequences; return each with its new token, if any."""
        by_id = {s.id: s for s in self.running}
        advanced: list[tuple[Sequence, int | None]] = []
        for row, sampled in zip(plan.rows, result.sampled, strict=True):
            sequence = by_id[row.sequence_id]
            sequence.num_computed += len(row.token_ids)
            self._register_full_blocks(sequence)
            if sampled is not None:
                sequence.token_ids.append(sampled.token_id)
            advanced.append((sequence, None if sampled is None else sampled.token_id))
        return advanced

    def finish_reason(self, sequence: Sequence) -> FinishReason | None:
        """Tell whether the sequence ends with the token it just got."""
        spec, token = sequence.request.spec, sequence.token_ids[-1]
        if token in spec.stop_token_ids:
            return FinishReason.STOP
        if token in self.eos_token_ids and not spec.ignore_eos:
            return FinishReason.STOP
        if sequence.num_output >= spec.max_tokens:
            return FinishReason.LENGTH
        if len(sequence.token_ids) >= self.max_context_tokens:
            return FinishReason.LENGTH
        return None

    def check_integrity(self, held_elsewhere: list[int]) -> list[str]:
        """Check pages against the pool's books and sequences against their queues."""
        sequences = [*self.waiting, *self.running]
        held = [page for s in sequences for page in s.pages] + held_elsewhere
        problems = self.pool.check_integrity(held)
        for s in self.running:
            if s.phase is not Phase.RUNNING or s.num_computed > len(s.pages) * self.block_size:
                problems.append(f"sequence {s.id}: {s.phase}, {s.num_computed} computed")
        problems += [f"sequence {s.id} waits with pages" for s in self.waiting if s.pages]
        return problems

    # -- pages ----------------------------------------------------------------------------

    def _take_pages(
        self, sequence: Sequence, count: int, chosen: dict[int, tuple[Sequence, int]]
    ) -> int:
        """Give a sequence pages for `count` more tokens; return for how many there were."""
        while len(sequence.pages) < self._num_blocks(sequence.num_computed + count):
            page = self.pool.allocate()
            if page is not None:
                sequence.pages.append(page)
            elif not self._preempt_after(sequence, chosen):
                return max(0, len(sequence.pages) * self.block_size - sequence.num_computed)
        return count

    def _preempt_after(
        self, sequence: Sequence, chosen: dict[int, tuple[Sequence, int]]
    ) -> bool:
        """Preempt the last running sequence in order if it comes after `sequence`."""
        victim = self.running[-1]
        if victim is sequence:
            return False
        chosen.pop(victim.id, None)
        self._page_copies = [c for c in self._page_copies if c[1] not in victim.pages]
        self.num_preemptions += 1
        self._remove(victim)
        self._release_pages(victim)
        victim.has_looked_up = False
        self.add(victim)
        return True

    def _release_pages(self, sequence: Sequence) -> None:
        # Last pages first: a chain is only useful from its head, so its end is reclaimed first.
        self.pool.free(reversed(sequence.pages))
        sequence.pages = []
        sequence.num_computed = 0
        sequence.num_registered = 0
        sequence.num_stored = 0

    def _remove(self, sequence: Sequence) -> None:
        queue = self.running if sequence.phase is Phase.RUNNING else self.waiting
        if sequence in queue:
            queue.remove(sequence)

    def _register_full_blocks(self, sequence: Sequence) -> None:
        num_full = sequence.num_computed // self.block_size
        if num_full > sequence.num_registered:
            keys = sequence.block_keys(num_full, self.block_size)
            for block in range(sequence.num_registered, num_full):
                self.pool.register(sequence.pages[block], keys[block])
            sequence.num_registered = num_full

    def _row(self, sequence: Sequence, count: int) -> Row:
        start = sequence.num_computed
        is_sampled = not sequence.is_leader and start + count == len(sequence.token_ids)
        return Row(
            sequence_id=sequence.id,
            token_ids=tuple(sequence.token_ids[start : start + count]),
            start=start,
            pages=tuple(sequence.pages),
            sample=_sample_spec(sequence) if is_sampled else None,
        )

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return (*sequence.request.order, sequence.index)


def _sample_spec(sequence: Sequence) -> SampleSpec:
    request: Request = sequence.request
    has_penalties = request.spec.sampling.has_penalties
    output = tuple(sequence.token_ids[sequence.num_prompt :]) if has_penalties else None
    return SampleSpec(
        sampling=request.spec.sampling,
        stream=sequence.index,
        position=len(sequence.token_ids),
        num_logprobs=request.spec.logprobs,
        prompt_token_ids=request.spec.prompt_token_ids if has_penalties else None,
        output_token_ids=output,
    )
