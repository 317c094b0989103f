"""Holds speculation together for one engine: who drafts, how much, and what came of it.

    draft    the controller says who drafts how much, drafters propose, the controller cuts
    observe  what was verified goes to drafters and controller
    forget   a sequence ended

The scheduler calls `draft` while it plans a step, the engine the other two. Nothing here changes
what is emitted; all of it is about how fast.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from paceline.domain.cost import StepShape
from paceline.domain.learnings import SequenceOutcome
from paceline.engine.ports import Advance
from paceline.engine.request import Sequence
from paceline.engine.spec.controller import OFF, Controller, Decision, Outcome, RowView
from paceline.engine.spec.drafter import (
    DraftBudget,
    DraftContext,
    Drafter,
    DrafterNeeds,
    Round,
    Versioned,
)
from paceline.engine.spec.lent_target import LentTarget
from paceline.engine.spec.outcomes import OutcomeBook
from paceline.engine.spec.report import SpeculationReport
from paceline.engine.spec.tally import Tally
from paceline.engine.spec.tree import EMPTY_TREE, ROOT, DraftTree
from paceline.engine.step import StepPlan, StepResult

logger = logging.getLogger(__name__)

_SUCCESSORS_EVERY = 8
"""Steps between reports of successors while nobody that needs them is in use: ranking the logits
of many rows takes time that nobody may get back."""


@dataclass(frozen=True, slots=True, eq=False)
class Speculation:
    """Who takes part."""

    drafters: Mapping[str, Drafter]
    """By name, at the start; each hears of every step once."""
    arms_of: Callable[[Mapping[str, Drafter]], dict[str, Drafter]]
    """Returns what the controller chooses from: drafters, and unions of them."""
    controller: Controller
    max_context_tokens: int
    vocab_size: int
    target: LentTarget | None = None
    """What drafters borrow of the engine."""
    may_reject: bool = False
    """Verify requests whose client gave no seed by recursive rejection."""


class Speculator:
    """The parts, and what is known of running sequences."""

    def __init__(
        self, parts: Speculation, *, clock_s: Callable[[], float] = time.perf_counter
    ) -> None:
        """`clock_s` times the drafters."""
        self._parts = parts
        self._controller = parts.controller
        self._clock_s = clock_s
        self._contexts: dict[int, DraftContext] = {}
        self._decisions: dict[int, Decision] = {}
        """Of the running step."""
        self._draft_s: dict[str, tuple[int, float]] = {}
        self._num_steps = 0
        self.drafters = parts.drafters
        """By name."""
        self._named = parts.arms_of(self.drafters)
        """Arms that requests may ask for."""
        self._arms = dict(self._named)
        """Those that have not misbehaved."""
        self._undrafted: set[int] = set()
        """Sequences whose step failed with a draft."""
        self._tally = Tally(self._named)
        self._outcomes = OutcomeBook()

    @property
    def needs(self) -> DrafterNeeds:
        """What must be found out about the rows of the step that was drafted for."""
        is_due = self._num_steps % _SUCCESSORS_EVERY == 0
        used = {decision.arm for decision in self._decisions.values()}
        return DrafterNeeds(
            successors=max(
                (d.needs.successors for n, d in self._named.items() if is_due or n in used),
                default=0,
            ),
            hidden=any(drafter.needs.hidden for drafter in self.drafters.values()),
        )

    @property
    def version(self) -> str:
        """Active versions of the weights that draft, joined with "+"; empty without any."""
        return "+".join(d.version for d in self.drafters.values() if d.version)

    @property
    def arms(self) -> tuple[str, ...]:
        """Names that requests may ask for."""
        return tuple(self._named)

    def change_models(self, models: Mapping[str, Drafter], renewed: Collection[str]) -> None:
        """Draft with these models from the next step on; called between two steps.

        Args:
            models: all versioned drafters, by name.
            renewed: those that were there before, but with other weights: what was held against
                them is forgotten.
        """
        others = {n: d for n, d in self.drafters.items() if not isinstance(d, Versioned)}
        self.drafters = {**others, **models}
        before, self._named = self._named, self._parts.arms_of(self.drafters)
        changed = [a for a in self._named if not set(a.split("+")).isdisjoint(renewed)]
        self._controller.retire([arm for arm in before if arm not in self._named])
        self._arms = {
            arm: drafter
            for arm, drafter in self._named.items()
            if arm not in before or arm in self._arms or arm in changed
        }
        self._controller.add(list(self._arms))
        self._controller.renew(changed)
        self._tally.change(self._named)

    def arm_of(self, sequence_id: int) -> str:
        """Return who drafted in the last step; empty if nobody did."""
        decision = self._decisions.get(sequence_id)
        return "" if decision is None else decision.arm

    def drafted_by(self, sequence_id: int) -> str:
        """Return the version, or versions joined with "+", that drafted in the last step."""
        decision = self._decisions.get(sequence_id)
        return "" if decision is None else self._version(decision.arm, sequence_id)

    def take_outcomes(self) -> list[SequenceOutcome]:
        """Return what models brought for sequences that ended since the last call."""
        return self._outcomes.take()

    def report(self) -> SpeculationReport:
        """Return what was brought since the start."""
        return self._tally.report(self._controller, self.version)

    def draft(
        self,
        sequences: list[Sequence],
        step: StepShape,
        reserve: Callable[[Sequence, int], int],
    ) -> Mapping[int, DraftTree]:
        """Return drafts by sequence id; see ports.DraftSource."""
        started_s = self._clock_s()
        self._num_steps += 1
        self._decisions.clear()
        self._draft_s.clear()
        drafting = [
            s
            for s in sequences
            if s.request.spec.speculation != "OFF" and s.id not in self._undrafted
        ]
        if not drafting:
            return {}
        rows = [self._view(s) for s in drafting]
        decisions = self._controller.plan(rows, step)
        if all(decision.arm == OFF for decision in decisions):
            trees = [EMPTY_TREE] * len(drafting)
        else:
            trees = self._propose(drafting, decisions, reserve)
            spent_s = self._clock_s() - started_s
            trees = self._controller.prune(trees, rows, decisions, step, spent_s)
        self._decisions.update(zip((s.id for s in drafting), decisions, strict=True))
        return {s.id: tree for s, tree in zip(drafting, trees, strict=True) if tree.tokens}

    def observe(self, plan: StepPlan, result: StepResult, advanced: list[Advance]) -> None:
        """Tell everybody what a step brought: sequences that have their new tokens already."""
        if not self._decisions:
            return
        started_s = self._clock_s()
        taken_by = {sequence.id: (sequence, taken) for sequence, taken in advanced}
        rounds: list[Round] = []
        outcomes: list[Outcome] = []
        versions: list[str] = []
        for i, (row, brought) in enumerate(zip(plan.rows, result.rows, strict=True)):
            if i in result.failed_rows and row.tree.tokens:
                # A token whose numbers are not finite spoils the row that it is drafted in.
                self._undrafted.add(row.sequence_id)
            decision = self._decisions.get(row.sequence_id)
            if decision is None or row.sequence_id not in taken_by:
                continue
            sequence, taken = taken_by[row.sequence_id]
            context = self._context(sequence)
            emitted = tuple([token.token_id for token in taken])
            rounds.append(
                Round(
                    context, row.tree, brought.path, emitted, brought.successors, brought.hidden_E
                )
            )
            outcomes.append(Outcome(sequence.id, decision, row.tree, brought.path))
            drafted = dict(self._versions(decision.arm, sequence.id))
            versions.append("+".join(drafted.values()))
            if drafted and row.tree.tokens:
                spec, path = sequence.request.spec, brought.path
                self._outcomes.add(sequence.id, spec, row.tree, path, len(taken), drafted)
        for name, drafter in self.drafters.items():
            with self._quarantine(name):
                drafter.observe(rounds)
        self._controller.observe(outcomes, self._draft_s)
        self._tally.add(outcomes, versions, self._draft_s, self._clock_s() - started_s)

    def forget(self, sequence_id: int) -> None:
        """Let go of a sequence."""
        self._contexts.pop(sequence_id, None)
        self._decisions.pop(sequence_id, None)
        self._controller.forget(sequence_id)
        self._undrafted.discard(sequence_id)
        self._outcomes.end(sequence_id)
        for name, drafter in self.drafters.items():
            with self._quarantine(name):
                drafter.forget(sequence_id)

    def _view(self, sequence: Sequence) -> RowView:
        spec = sequence.request.spec
        left = min(
            spec.max_tokens - sequence.num_output,
            self._parts.max_context_tokens - len(sequence.token_ids),
        )
        # The token behind a path is the target's own.
        domain = f"{spec.cache_salt.hex()}/{spec.domain}"
        return RowView(sequence.id, domain, spec.speculation, left - 1)

    def _versions(self, arm: str, sequence_id: int) -> Iterator[tuple[str, str]]:
        """Return the parts of an arm that have weights, with the version that a sequence uses."""
        for name in arm.split("+"):
            drafter = self.drafters.get(name)
            if isinstance(drafter, Versioned):
                yield name, drafter.version_of(sequence_id)
            elif drafter is not None and drafter.version:
                yield name, drafter.version

    def _version(self, arm: str, sequence_id: int) -> str:
        return "+".join(version for _, version in self._versions(arm, sequence_id))

    def _context(self, sequence: Sequence) -> DraftContext:
        context = self._contexts.get(sequence.id)
        if context is None:
            spec = sequence.request.spec
            context = self._contexts[sequence.id] = DraftContext(
                sequence_id=sequence.id,
                tenant=spec.cache_salt,
                token_ids=sequence.token_ids,
                num_prompt=sequence.num_prompt,
                sampling=spec.sampling,
                stream=sequence.index,
                is_coupled=not (self._parts.may_reject and spec.is_seed_drawn),
            )
        return context

    def _propose(
        self,
        sequences: list[Sequence],
        decisions: list[Decision],
        reserve: Callable[[Sequence, int], int],
    ) -> list[DraftTree]:
        """Let each chosen arm propose for all of its sequences at once."""
        trees = [EMPTY_TREE] * len(sequences)
        by_arm: dict[str, list[int]] = {}
        for i, decision in enumerate(decisions):
            if decision.budget is not None:
                by_arm.setdefault(decision.arm, []).append(i)
        for arm, indices in by_arm.items():
            contexts, budgets, drafting = [], [], []
            for i in indices:
                budget = decisions[i].budget
                assert budget is not None
                room = reserve(sequences[i], budget.nodes)
                if room > 0:
                    drafting.append(i)
                    contexts.append(self._context(sequences[i]))
                    budgets.append(budget.within(room))
            if not drafting:
                continue
            started_s = self._clock_s()
            if self._parts.target is not None:
                self._parts.target.lend({sequences[i].id: sequences[i].pages.ids for i in drafting})
            with self._quarantine(arm):
                proposed = self._arms[arm].propose(contexts, budgets)
                for tree, budget in zip(proposed, budgets, strict=True):
                    self._check(tree, budget)
                for i, tree in zip(drafting, proposed, strict=True):
                    trees[i] = tree
            self._draft_s[arm] = (len(drafting), self._clock_s() - started_s)
        return trees

    def _check(self, tree: DraftTree, budget: DraftBudget) -> None:
        """Refuse a tree that the step could not compute.

        Raises:
            ValueError: it has too many nodes, a token or a parent that there is not.
        """
        if len(tree) > budget.nodes or max(tree.depths, default=0) > budget.depth:
            raise ValueError(f"{len(tree)} nodes, {budget.nodes} asked for at most")
        if not all(0 <= token < self._parts.vocab_size for token in tree.tokens):
            raise ValueError(f"tokens {tree.tokens}: the vocabulary has {self._parts.vocab_size}")
        if not all(ROOT <= parent < node for node, parent in enumerate(tree.parents)):
            raise ValueError(f"parents {tree.parents}: none comes before its node")
        fields = (tree.parents, tree.values, tree.confidences, tree.sources)
        if any(len(field) != len(tree) for field in fields):
            raise ValueError("a node lacks a parent, value, confidence or source")

    @contextmanager
    def _quarantine(self, name: str) -> Iterator[None]:
        """Keep errors of a drafter from the requests: it and its unions do not draft any more."""
        try:
            yield
        except Exception:
            parts = name.split("+")
            out = [arm for arm in self._arms if set(parts) <= set(arm.split("+"))]
            logger.exception("drafter-failed", extra={"fields": {"drafter": name, "arms": out}})
            for arm in out:
                del self._arms[arm]
            self._controller.retire(out)
