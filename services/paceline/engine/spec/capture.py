"""Captures generated tokens with the target's distributions, as samples to train drafts with.

    admit    a sequence whose client allows it may be captured; of others nothing is known here
    choose   says which rows of a step are recorded, before it runs
    observe  takes what the runner recorded
    forget   a sequence ended
    take     hands over the samples that are complete

A sequence is chosen at the start of a window, by need and as time allows, and stays chosen until
the window is full or the sequence ends. engine.py calls this file; nothing here changes tokens.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from paceline.domain.learnings import Sample, TokenOrigin, tenant_digest
from paceline.engine.ports import Advance
from paceline.engine.request import Sequence
from paceline.engine.spec.tree import ROOT
from paceline.engine.step import Captured, CaptureNeeds, Row, RowResult, StepPlan, StepResult

WINDOW_TOKENS = 64
"""Most captured tokens of a sample."""
CONTEXT_TOKENS = 192
"""Most tokens of context in front of them."""
MIN_TOKENS = 8
"""Fewer captured tokens are not worth their context."""

_SAVED_WINDOWS = 4
"""Windows' worth of time that may be saved up while there is nothing to capture."""
_COST_RATE = 0.1
"""Weight of the newest step in the mean cost of a token."""
_PRIOR_TOKENS = 16
"""Tried tokens that what is known of a domain counts for in one of its sequences."""
_MAX_DOMAINS = 256
_MAX_TRIED, _MAX_SAMPLES = 4096, 256
"""Counts of domains are halved beyond these: what was long ago counts less."""
_UNDRAFTED = bytes([TokenOrigin.UNDRAFTED])


@dataclass(slots=True)
class Counts:
    """What is known of a sequence or a domain."""

    tried: int = 0
    """Positions at which a drafted token was put to the test."""
    accepted: int = 0
    samples: int = 0
    """Windows begun."""


def need(domain: Counts, sequence: Counts) -> tuple[float, float]:
    """Return how much samples of a domain are wanted, and in it those of one of its sequences.

        refused(domain)    (refused + 1) / (tried + 2)
        refused(sequence)  (refused + 16 refused(domain)) / (tried + 16)
        need               refused / (1 + samples), of each

    The largest is served first, domains before sequences. So domains are sampled in proportion to
    how often their drafts are refused, whatever their share of the traffic, and within a domain
    sequences likewise.
    """
    expected = (domain.tried - domain.accepted + 1) / (domain.tried + 2)
    refused = sequence.tried - sequence.accepted + _PRIOR_TOKENS * expected
    own = refused / (sequence.tried + _PRIOR_TOKENS)
    return expected / (1 + domain.samples), own / (1 + sequence.samples)


@dataclass(slots=True, eq=False)
class _Window:
    """A sample in the making.

    token_ids  [ .... context | captured, one entry in each array | ....
                              start
    """

    start: int
    parts: list[Captured] = field(default_factory=list)
    origins: bytearray = field(default_factory=bytearray)

    @property
    def end(self) -> int:
        """Position behind the captured tokens."""
        return self.start + len(self.origins)

    @property
    def num_left(self) -> int:
        """Tokens until it is full."""
        return WINDOW_TOKENS - len(self.origins)


@dataclass(slots=True, eq=False)
class _Known:
    """A sequence that may be captured."""

    sequence: Sequence
    domain: Counts
    own: Counts = field(default_factory=Counts)
    draft_version: str = ""
    window: _Window | None = None

    @property
    def is_worth_starting(self) -> bool:
        """Whether enough tokens can still come."""
        sequence = self.sequence
        return sequence.request.spec.max_tokens - sequence.num_output >= MIN_TOKENS


class Capture:
    """Chooses what is captured, and puts samples together."""

    def __init__(
        self,
        *,
        share: float,
        top: int,
        hidden: bool = False,
        version_of: Callable[[int], str] = lambda sequence_id: "",
        clock_s: Callable[[], float] = time.thread_time,
    ) -> None:
        """Capture for a share of the time.

        Args:
            share: of the time of steps, that capturing may add to it.
            top: tokens named of each distribution.
            hidden: record final hidden states, too.
            version_of: version of the draft model that drafts for a sequence.
            clock_s: times the extra work. By default in processor time of the thread, which is
                what capturing takes from steps. Wall time also has what others ran meanwhile: with
                a process of idle priority on each core it was up to 9 times as much, though that
                would have held the step up as long elsewhere.
        """
        self._share = share
        self._needs = CaptureNeeds(top=top, hidden=hidden)
        self._version_of = version_of
        self._clock_s = clock_s
        self._known: dict[int, _Known] = {}
        self._open: dict[int, _Known] = {}
        """Those with a window."""
        self._num_left = 0
        """Tokens until all open windows are full."""
        self._domains: OrderedDict[tuple[bytes, str], Counts] = OrderedDict()
        self._samples: list[Sample] = []
        self._allowance_s = 0.0
        self._token_s: float | None = None
        """Mean cost of a captured token; None before the first."""
        self._step_s = 0.0
        """What the running step has cost so far."""
        self._spent_s = 0.0
        """Since the samples were last taken."""

    @property
    def has_samples(self) -> bool:
        """Whether there is something to take."""
        return bool(self._samples)

    @property
    def num_sequences(self) -> int:
        """Sequences that something is kept for."""
        return len(self._known)

    def admit(self, sequence: Sequence) -> None:
        """Let a new sequence be captured if its request allows it."""
        request = sequence.request
        if request.spec.allow_training and not request.is_prefill_only:
            domain = self._domain(request.spec.cache_salt, request.spec.domain)
            self._known[sequence.id] = _Known(sequence, domain)

    def choose(self, plan: StepPlan) -> StepPlan:
        """Return the plan with the rows named that are to be recorded."""
        if not self._open and not self._can_start():
            return plan
        begun_s = self._clock_s()
        if self._can_start():
            self._start(plan)
        drawn = [row.sequence_id for row in plan.rows if row.sample is not None]
        chosen = [id_ for id_ in drawn if id_ in self._open]
        if chosen:
            ids = frozenset(chosen)
            # Mostly those of the step before.
            if ids != self._needs.sequence_ids:
                self._needs = replace(self._needs, sequence_ids=ids)
            # In less than half the time of `replace`.
            plan = StepPlan(plan.rows, plan.page_copies, plan.wanted, self._needs)
        self._step_s += self._clock_s() - begun_s
        return plan

    def observe(self, plan: StepPlan, result: StepResult, advanced: list[Advance]) -> None:
        """Take what a step brought: sequences have their new tokens already."""
        num_captured = 0
        if self._known:
            begun_s = self._clock_s()
            self._count(plan, result)
            if plan.captured.sequence_ids:
                taken_by = {sequence.id: len(taken) for sequence, taken in advanced}
                for row, brought in zip(plan.rows, result.rows, strict=True):
                    if brought.captured is not None and (count := taken_by.get(row.sequence_id, 0)):
                        num_captured += self._add(row, brought, brought.captured, count)
            self._step_s += self._clock_s() - begun_s
        self._charge(result, num_captured)

    def forget(self, sequence: Sequence) -> None:
        """Let go of a sequence that ended; unknown ones are ignored."""
        known = self._known.pop(sequence.id, None)
        if known is not None and known.window is not None:
            begun_s = self._clock_s()
            self._close(known)
            self._step_s += self._clock_s() - begun_s

    def take(self) -> tuple[tuple[Sample, ...], float]:
        """Return the samples completed since the last call, and the seconds spent since."""
        samples, self._samples = tuple(self._samples), []
        spent_s, self._spent_s = self._spent_s, 0.0
        return samples, spent_s

    # -- time -----------------------------------------------------------------------------

    def _charge(self, result: StepResult, num_captured: int) -> None:
        """Settle a step's cost, and grant the share of its time."""
        cost_s, self._step_s = self._step_s + result.capture_s, 0.0
        self._spent_s += cost_s
        self._allowance_s += self._share * result.elapsed_s - cost_s
        if num_captured:
            token_s = cost_s / num_captured
            before_s = token_s if self._token_s is None else self._token_s
            self._token_s = before_s + _COST_RATE * (token_s - before_s)
        if self._token_s is not None:
            most_s = _SAVED_WINDOWS * WINDOW_TOKENS * self._token_s
            self._allowance_s = min(self._allowance_s, most_s)

    def _can_start(self) -> bool:
        """Tell whether there is a sequence without a window, and time for one more.

        The time is beside what the open windows will take. What a token costs is learnt from a
        first window, whose cost is paid back afterwards.
        """
        if len(self._open) == len(self._known):
            return False
        if self._token_s is None:
            return not self._open
        return self._allowance_s >= (WINDOW_TOKENS + self._num_left) * self._token_s

    # -- windows --------------------------------------------------------------------------

    def _start(self, plan: StepPlan) -> None:
        """Begin a window for the sequence that is wanted most, if there is one."""
        best: _Known | None = None
        most = (0.0, 0.0)
        for row in plan.rows:
            known = self._known.get(row.sequence_id)
            if row.sample is None or known is None or known.window is not None:
                continue
            if not known.is_worth_starting:
                continue
            wanted = need(known.domain, known.own)
            if wanted > most:
                best, most = known, wanted
        if best is None:
            return
        best.window = _Window(start=len(best.sequence.token_ids))
        best.own.samples += 1
        best.domain.samples += 1
        self._open[best.sequence.id] = best
        self._num_left += WINDOW_TOKENS
        if sum(domain.samples for domain in self._domains.values()) > _MAX_SAMPLES:
            for domain in self._domains.values():
                domain.samples //= 2

    def _add(self, row: Row, brought: RowResult, captured: Captured, count: int) -> int:
        """Add the first `count` tokens of a row to its window; return how many found room."""
        known = self._open[row.sequence_id]
        window = known.window
        assert window is not None
        assert window.end == len(known.sequence.token_ids) - count, "a window has a gap"
        if row.tree.tokens:
            known.draft_version = self._version_of(row.sequence_id)
        count = min(count, window.num_left)
        window.parts.append(captured.first(count))
        window.origins += _origins(row, brought)[:count]
        self._num_left -= count
        if not window.num_left:
            self._close(known)
        return count

    def _close(self, known: _Known) -> None:
        """End a sequence's window and keep the sample if it is one."""
        window, known.window = known.window, None
        del self._open[known.sequence.id]
        assert window is not None
        self._num_left -= window.num_left
        if len(window.origins) < MIN_TOKENS:
            return
        spec = known.sequence.request.spec
        first = max(0, window.start - CONTEXT_TOKENS)
        self._samples.append(
            Sample(
                tenant=tenant_digest(spec.cache_salt),
                domain=spec.domain,
                draft_version=known.draft_version,
                temperature=spec.sampling.temperature,
                first_position=first,
                token_ids=tuple(known.sequence.token_ids[first : window.end]),
                num_context=window.start - first,
                top=self._needs.top,
                top_ids=b"".join([part.top_ids for part in window.parts]),
                top_probs=b"".join([part.top_probs for part in window.parts]),
                tail_mass=b"".join([part.tail_mass for part in window.parts]),
                origins=bytes(window.origins),
                hidden=b"".join([part.hidden for part in window.parts]),
            )
        )

    # -- counts ---------------------------------------------------------------------------

    def _count(self, plan: StepPlan, result: StepResult) -> None:
        """Count what became of the drafts of sequences that may be captured."""
        for row, brought in zip(plan.rows, result.rows, strict=True):
            if not row.tree.tokens or not brought.tokens:
                continue
            known = self._known.get(row.sequence_id)
            if known is None:
                continue
            accepted = len(brought.path)
            tried = accepted + _has_children(row, brought)
            for counts in (known.domain, known.own):
                counts.tried += tried
                counts.accepted += accepted
            if known.domain.tried > _MAX_TRIED:
                known.domain.tried //= 2
                known.domain.accepted //= 2

    def _domain(self, cache_salt: bytes, name: str) -> Counts:
        key = (cache_salt, name)
        domain = self._domains.get(key)
        if domain is None:
            domain = self._domains[key] = Counts()
            if len(self._domains) > _MAX_DOMAINS:
                self._domains.popitem(last=False)
        else:
            self._domains.move_to_end(key)
        return domain


def _origins(row: Row, brought: RowResult) -> bytes:
    """Return how each token of a row came about, as `TokenOrigin` bytes."""
    if not row.tree.tokens:
        return _UNDRAFTED
    last = TokenOrigin.CORRECTED if _has_children(row, brought) else TokenOrigin.BONUS
    return bytes([TokenOrigin.ACCEPTED] * len(brought.path) + [last])


def _has_children(row: Row, brought: RowResult) -> bool:
    """Tell whether something was drafted at the place of a row's last token."""
    return (brought.path[-1] if brought.path else ROOT) in row.tree.parents
