"""Decides who runs in the next step; holds queues and page tables, no tensors.

Order is (priority, arrival). Each step takes every running decode row, then prompt chunks
while its tokens and its pace (chunking.py) last. Pages are taken as tokens need them; when the
pool is dry, the last sequence in order gives its pages back and waits again: its full blocks
stay findable in the pool and in the KV store, so that little is computed twice. A waiting
sequence displaces running ones of lower priority, never of its own.
engine.py and admission.py call this file and perform what it decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from paceline.domain.cost import StepShape
from paceline.domain.request import FinishReason
from paceline.engine.blocks import BlockPool
from paceline.engine.chunking import StepPace
from paceline.engine.integrity import check_queues
from paceline.engine.page_table import PageTable
from paceline.engine.ports import Advance, DraftSource
from paceline.engine.request import Phase, Sequence
from paceline.engine.rows import build_row
from paceline.engine.spec.drafter import NO_NEEDS
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree
from paceline.engine.step import SampledToken, StepPlan, StepResult

_Chosen = dict[int, tuple[Sequence, int]]

CHUNK_UNIT = 8
"""Prompt tokens by which a chunk beside decoding rows grows, and its least. Where arithmetic is
slow for its memory, 16 tokens more take as long as 8 decoding rows do alone."""


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
        pace: StepPace | None = None,
    ) -> None:
        """Without a pace only `step_tokens` limits the prompt work of a step."""
        self.pool = pool
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.step_tokens = step_tokens
        self.max_context_tokens = max_context_tokens
        self.eos_token_ids = eos_token_ids
        self.pace = pace
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._num_steps = 0

    # -- queues ---------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by its request's order."""
        sequence.phase = Phase.WAITING
        if sequence.arrived_at is None:
            sequence.arrived_at = self._num_steps
        self.waiting.append(sequence)
        self.waiting.sort(key=Sequence.order)

    def finish(self, sequence: Sequence, reason: FinishReason | None) -> None:
        """End a sequence in any phase and give its pages back."""
        if sequence.phase is Phase.FINISHED:
            return
        self._remove(sequence)
        self._release_pages(sequence)
        sequence.phase = Phase.FINISHED
        sequence.finish_reason = reason

    def num_startable(self, sequence: Sequence) -> int:
        """Sequences like this one that could start now, pages aside."""
        priority = sequence.request.spec.priority
        num_staying = sum(s.request.spec.priority >= priority for s in self.running)
        return self.max_num_seqs - num_staying

    def match_prefix(self, sequence: Sequence) -> int:
        """Take shared pages for the leading blocks the pool knows; return how many."""
        assert not sequence.pages
        for key in sequence.block_keys(sequence.max_cached // self.block_size, self.block_size):
            page = self.pool.find(key)
            if page is None:
                break
            sequence.pages.append(self.pool.share(page))
        sequence.num_computed = len(sequence.pages) * self.block_size
        sequence.num_registered = len(sequence.pages)
        return len(sequence.pages)

    def make_room(self, sequence: Sequence) -> bool:
        """Tell whether a matched sequence can start now; lower priorities give way if need be.

        It must fit beside what the running ones still need for their prompts and one page
        more for each, so that it does not force a preemption with its first decode steps; an
        idle engine admits anything.
        """
        needed = self._num_missing(sequence) + sum(self._num_missing(s) + 1 for s in self.running)
        available, num_running = self.pool.num_available, len(self.running)
        victims: list[Sequence] = []
        for victim in [*reversed(self.running), None]:
            if num_running < self.max_num_seqs and (not num_running or available >= needed):
                break
            if victim is None or victim.request.spec.priority >= sequence.request.spec.priority:
                return False
            victims.append(victim)
            available += self.pool.num_exclusive(victim.held_pages)
            needed -= self._num_missing(victim) + 1
            num_running -= 1
        for victim in victims:
            self._preempt(victim)
        return True

    def start(self, sequence: Sequence) -> None:
        """Move a waiting sequence to the running ones."""
        self.waiting.remove(sequence)
        sequence.phase = Phase.RUNNING
        self.running.append(sequence)
        self.running.sort(key=Sequence.order)

    def register_loaded(self, sequence: Sequence) -> None:
        """Let blocks that were filled from outside serve prefix hits."""
        self._register_full_blocks(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Undo a `match_prefix` of a sequence that stays waiting."""
        self._release_pages(sequence)

    def fork(self, leader: Sequence, siblings: list[Sequence]) -> None:
        """Let siblings share the leader's prompt pages; a partial last page is copied.

        pages  [full | full | full | partial]
                shared by all.....   own copy each, made with the sibling's first row
        """
        num_full, has_partial = divmod(leader.num_computed, self.block_size)
        for sibling in siblings:
            copy = self.pool.allocate() if has_partial else None
            if (has_partial and copy is None) or len(self.running) >= self.max_num_seqs:
                self.pool.free([] if copy is None else [copy])
                self.add(sibling)
                continue
            shared = [self.pool.share(page) for page in leader.pages[:num_full]]
            sibling.pages = PageTable(shared)
            sibling.keys = list(leader.keys[:num_full])
            sibling.num_registered = min(leader.num_registered, num_full)
            sibling.num_stored = leader.num_stored
            sibling.num_computed = leader.num_computed
            if copy is not None:
                sibling.pending_copy = (self.pool.share(leader.pages[num_full]), copy)
                sibling.pages.append(copy)
            sibling.phase = Phase.RUNNING
            self.running.append(sibling)
        self.running.sort(key=Sequence.order)

    # -- one step -------------------------------------------------------------------------

    def plan(
        self, reclaim: Callable[[], bool], drafts: DraftSource | None = None
    ) -> StepPlan | None:
        """Choose the rows of the next step, or None when nothing can run.

        `reclaim` is called when the pool is dry, before anybody is preempted: it gives a page
        back that no sequence needs, or returns False.
        """
        chosen: _Chosen = {}
        remaining = [s.num_remaining for s in self.running]
        decoding = [s for s, n in zip(self.running, remaining, strict=True) if n == 1]
        computing = [s for s, n in zip(self.running, remaining, strict=True) if n > 1]
        for sequence in decoding:
            self._choose(sequence, 1, chosen, reclaim)
        if computing:
            self._choose_chunks(computing, chosen, reclaim)
        if not chosen:
            return None
        trees: Mapping[int, DraftTree] = {}
        if drafts is not None and decoding:
            decoding = [s for s in decoding if s.id in chosen and not s.is_leader]
            trees = drafts.draft(decoding, _shape(chosen), self._reserve)
        copies = [s.pending_copy for s, _ in chosen.values() if s.pending_copy is not None]
        rows = [build_row(s, n, trees.get(s.id, EMPTY_TREE)) for s, n in chosen.values()]
        wanted = NO_NEEDS if drafts is None else drafts.needs
        return StepPlan(tuple(rows), tuple(copies), wanted)

    def commit(self, plan: StepPlan, result: StepResult) -> tuple[list[Advance], list[Sequence]]:
        """Book a step: return who advanced, with the tokens taken, and who failed.

        Of an accepted draft only what comes in front of the sequence's end is taken. Failed
        sequences stay as they were before the step; the caller ends them. A row with a draft may
        have failed for what was drafted: its sequence has done nothing in this step.
        """
        by_id, block_size = {s.id: s for s in self.running}, self.block_size
        self._num_steps += 1
        advanced: list[Advance] = []
        failed: list[Sequence] = []
        for i, (row, brought) in enumerate(zip(plan.rows, result.rows, strict=True)):
            sequence = by_id[row.sequence_id]
            if i in result.failed_rows:
                if not row.tree.tokens:
                    failed.append(sequence)
                continue
            if sequence.pending_copy is not None:
                self.pool.free(sequence.pending_copy[:1])
                sequence.pending_copy = None
            taken = self._take(sequence, brought.tokens)
            computed = sequence.num_computed + len(row.token_ids) + len(brought.path)
            sequence.num_computed = min(computed, len(sequence.token_ids))
            if sequence.num_computed >= (sequence.num_registered + 1) * block_size:
                self._register_full_blocks(sequence)
            if taken and sequence.streams_since is None:
                sequence.streams_since = self._num_steps
            advanced.append((sequence, taken))
        return advanced, failed

    def _take(
        self, sequence: Sequence, tokens: tuple[SampledToken, ...]
    ) -> tuple[SampledToken, ...]:
        """Append tokens until the sequence ends; return those that were taken."""
        for count, token in enumerate(tokens, 1):
            sequence.token_ids.append(token.token_id)
            if count < len(tokens) and self.finish_reason(sequence) is not None:
                return tokens[:count]
        return tokens

    def finish_reason(self, sequence: Sequence) -> FinishReason | None:
        """Tell whether the sequence ends with the tokens it has."""
        spec = sequence.request.spec
        num_output = sequence.num_output
        if num_output > 0:
            token = sequence.token_ids[-1]
            if token in spec.stop_token_ids:
                return FinishReason.STOP
            if token in self.eos_token_ids and not spec.ignore_eos:
                return FinishReason.STOP
        if num_output >= spec.max_tokens or len(sequence.token_ids) >= self.max_context_tokens:
            return FinishReason.LENGTH
        return None

    def check_integrity(self, held_elsewhere: list[int]) -> list[str]:
        """Check pages against the pool's books and sequences against their queues."""
        sequences = [*self.waiting, *self.running]
        held = [page for s in sequences for page in s.held_pages] + held_elsewhere
        problems = self.pool.check_integrity(held)
        problems += check_queues(self.waiting, self.running, self.pool, self.block_size)
        if len(self.running) > self.max_num_seqs:
            problems.append(f"{len(self.running)} sequences run, {self.max_num_seqs} may")
        return problems

    # -- pages ----------------------------------------------------------------------------

    def _choose(
        self, sequence: Sequence, budget: int, chosen: _Chosen, reclaim: Callable[[], bool]
    ) -> int:
        """Put a sequence into the step with as many tokens as there is room for; return those."""
        if sequence.phase is not Phase.RUNNING:
            return 0
        count = min(sequence.num_remaining, budget)
        while len(sequence.pages) * self.block_size < sequence.num_computed + count:
            page = self.pool.allocate()
            if page is not None:
                sequence.pages.append(page)
            elif not (
                reclaim()
                or self._take_back_spare(sequence, chosen)
                or self._preempt_after(sequence, chosen)
            ):
                count = max(0, len(sequence.pages) * self.block_size - sequence.num_computed)
                break
        if count > 0:
            chosen[sequence.id] = (sequence, count)
        return count

    def _reserve(self, sequence: Sequence, num_nodes: int) -> int:
        """Take pages for a draft behind a decoding row, as far as nobody else needs them.

        Returns how many nodes fit.
        """
        needed = sequence.num_computed + 1
        while len(sequence.pages) * self.block_size < needed + num_nodes:
            # Every running sequence keeps a page to go on with.
            page = self.pool.allocate() if self.pool.num_available > len(self.running) else None
            if page is None:
                break
            sequence.pages.append(page)
        return min(num_nodes, len(sequence.pages) * self.block_size - needed)

    def _take_back_spare(self, taker: Sequence, chosen: _Chosen) -> bool:
        """Free a page that another one took for drafts and that holds nothing, if there is one."""
        for sequence in self.running:
            _, count = chosen.get(sequence.id, (sequence, 1))
            needed = -(-(sequence.num_computed + count) // self.block_size)
            if sequence is not taker and len(sequence.pages) > needed:
                self.pool.free([sequence.pages.pop()])
                return True
        return False

    def _choose_chunks(
        self, computing: list[Sequence], chosen: _Chosen, reclaim: Callable[[], bool]
    ) -> None:
        """Add prompt chunks to a step that holds its decoding rows.

        A prompt keeps to the pace of streams that were there before it. Those it was there
        before wait for it: requests that came together decode together soonest that way.
        """
        # Prompts go on, if slowly, however many rows decode.
        unit = min(self.block_size, CHUNK_UNIT)
        least = min(unit, self.step_tokens)
        budget = max(self.step_tokens - len(chosen), least)
        attended = sum(s.num_computed + 1 for s, _ in chosen.values())
        step = StepShape(rows=len(chosen), attended=attended)
        started = [s.streams_since for s, _ in chosen.values() if s.streams_since is not None]
        for sequence in computing:
            start = sequence.num_computed
            most = min(sequence.num_remaining, budget)
            has_elders = min(started, default=math.inf) <= (sequence.arrived_at or 0)
            if self.pace is not None and has_elders:
                most = self.pace.chunk_tokens(
                    step, start=start, least=min(least, most), most=most, unit=unit
                )
            if most > 0:
                count = self._choose(sequence, most, chosen, reclaim)
                step, budget, least = step.with_chunk(count, start), budget - count, 0

    def _preempt_after(self, sequence: Sequence, chosen: _Chosen) -> bool:
        """Preempt the last running sequence in order if it comes after `sequence`."""
        victim = self.running[-1]
        if victim is sequence:
            return False
        chosen.pop(victim.id, None)
        self._preempt(victim)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.num_preemptions += 1
        self._remove(victim)
        self._release_pages(victim)
        victim.has_looked_up = False
        self.add(victim)

    def _release_pages(self, sequence: Sequence) -> None:
        # Last pages first: a chain is only useful from its head, so its end is reclaimed first.
        self.pool.free(reversed(sequence.held_pages))
        sequence.pages = PageTable()
        sequence.pending_copy = None
        sequence.num_computed = 0
        sequence.num_registered = 0

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

    def _num_missing(self, sequence: Sequence) -> int:
        """Count the pages that a sequence will need for its target and has not."""
        return max(0, -(-sequence.target // self.block_size) - len(sequence.pages))


def _shape(chosen: _Chosen) -> StepShape:
    """Return what a step computes, drafts aside."""
    shape = StepShape()
    for sequence, count in chosen.values():
        start = sequence.num_computed
        if sequence.num_remaining == 1:
            shape = replace(shape, rows=shape.rows + 1, attended=shape.attended + start + 1)
        else:
            shape = shape.with_chunk(count, start)
    return shape
