"""Decides who drafts for which sequence and how much, in tokens per second; pure values.

An arm is a drafter or a union of some. What an arm's drafts are worth is learnt as a profile: the
probabilities that their best, second best, ... node is accepted, which do not depend on load.
What they cost comes from the step cost of the moment. So the expected rate of any arm with any
number of nodes is known at every load,

    rate(arm, n) = rows * (1 + profile[0] + ... + profile[n-1]) / (T(rows, rows * n) + drafting)

and that of no draft is rows / T(rows, 0), exactly. The best of all is taken, for each sequence by
its own profiles, which start from those of its domain. Arms that are not in use are tried now and
then, out of an allowance: a fixed share of the time, so that exploring costs no more than that.
speculator.py calls this file.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from paceline.domain.cost import StepCost, StepShape
from paceline.engine.spec.calibration import Calibration
from paceline.engine.spec.drafter import DraftBudget
from paceline.engine.spec.profile import DraftTimes, Profile
from paceline.engine.spec.prune import prune
from paceline.engine.spec.step_times import NodeCurve, StepTimes
from paceline.engine.spec.tree import ROOT, DraftTree

Value = TypeVar("Value")

OFF = "off"
"""The arm that does not draft."""

_EXPLORED_SHARE = 0.01
"""Share of the time that may go to arms other than the best."""
_FIRST_TRIALS = 4
"""Rounds in which an arm that nobody has used yet is tried whatever it costs."""
_KNOWN_DRAFTS = 24
"""Drafts of an arm in a domain after which a trial is charged what the best arm would have brought:
before, nobody knows whether it is not the best itself."""
_MARGIN = 1.02
"""How much faster than no draft one must be to be made: predictions are off by some per cent."""
_DOUBT = 1.04
"""How much faster than a union one of its parts must seem to be taken: the best of many arms that
are known a little seems better than it is, and a union loses little where a part would do."""
_USUAL_SIZE = 4
"""Nodes that a draft is taken to have where nothing better is known."""
_DECIDE_EVERY = 4
"""Rounds of a sequence between two choices of its arm."""
_DOMAIN_RATE, _SEQUENCE_RATE = 0.02, 0.03
"""Weights of the newest draft in the means of a domain and of a sequence. With 0.1 the last ten
drafts of a sequence decided, and luck among them about the arm: 1 % fewer tokens per pass."""
_MAX_DOMAINS = 256
_LENIENCE = 0.7
"""Drafters are asked for nodes worth a little less than what is kept in the end: what the other
sequences' nodes are worth is not known yet."""


@dataclass(frozen=True, slots=True)
class RowView:
    """A decoding sequence as the controller sees it."""

    sequence_id: int
    domain: str
    """Tenant and label of the traffic that it is like."""
    mode: str
    """"AUTO", or the name of the one arm to use."""
    depth: int
    """Most draft tokens on a path that could be of use."""


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What to draft for a sequence, and why."""

    arm: str
    """OFF for nothing."""
    reason: str
    """"on", "off", "explore" or "forced"."""
    budget: DraftBudget | None = None
    rate: float = 0.0
    """Tokens per second that all rows together are expected to bring this way."""
    off_rate: float = 0.0
    """The same without drafts."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What came of a decision."""

    sequence_id: int
    decision: Decision
    tree: DraftTree
    """As it was verified."""
    path: tuple[int, ...]


@dataclass(slots=True)
class _Domain:
    """What is known of similar sequences."""

    profiles: dict[str, Profile]
    calibrations: dict[str, Calibration]
    """By drafter: the parts of a union learn apart."""

    def calibration(self, drafter: str) -> Calibration:
        """Return what a drafter's confidences are worth here."""
        found = self.calibrations.get(drafter)
        if found is None:
            found = self.calibrations[drafter] = Calibration()
        return found


@dataclass(slots=True)
class _Choice:
    """What was chosen for a sequence, until it is chosen anew."""

    arm: str
    nodes: int
    threshold: float
    rate: float
    off_rate: float
    num_rows: int
    rounds_left: int = _DECIDE_EVERY


@dataclass(slots=True)
class _Sequence:
    domain: _Domain
    profiles: dict[str, Profile] = field(default_factory=dict)
    """Of the arms it has used."""
    choice: _Choice | None = None

    def profile(self, arm: str) -> Profile:
        """Return what is expected of an arm for it."""
        return self.profiles.get(arm) or self.domain.profiles[arm]


class Controller:
    """Chooses arms and sizes, and learns what they bring."""

    def __init__(
        self,
        arms: Sequence[str],
        cost: StepCost,
        *,
        max_nodes: int,
        max_depth: int,
        rng: random.Random,
    ) -> None:
        """`arms`: names, tried in this order."""
        self._arms = tuple(arms)
        self._ranked = _ranked(arms)
        self._times = StepTimes(cost)
        self._max_nodes, self._max_depth = max_nodes, max_depth
        self._rng = rng
        self._all = _Domain({arm: Profile(_DOMAIN_RATE) for arm in arms}, {})
        """Everything there was; new domains start from it."""
        self._domains: OrderedDict[str, _Domain] = OrderedDict()
        self._sequences: dict[int, _Sequence] = {}
        self._draft_times = {arm: DraftTimes() for arm in arms}
        self._levels: dict[str, int] = {}
        """Of the running step's trees before they were cut, by arm."""
        self._allowance_s = 0.0
        self.decisions: dict[tuple[str, str], int] = {}
        """How often was decided, by arm and reason."""
        self.last = Decision(OFF, OFF)
        """The last decision."""

    @property
    def num_sequences(self) -> int:
        """Sequences that something is kept for."""
        return len(self._sequences)

    def plan(self, rows: Sequence[RowView], step: StepShape) -> list[Decision]:
        """Decide for the sequences of a step, which has `step`'s rows and prompt chunks."""
        times = self._times.of(step)
        self._allowance_s += _EXPLORED_SHARE * times.at(0)
        # One sequence at a time tries something else: the others' tokens come as they would.
        explorer = self._rng.randrange(len(rows)) if rows else 0
        decisions = [self._decide(row, times, i == explorer) for i, row in enumerate(rows)]
        for decision in decisions:
            key = (decision.arm, decision.reason)
            self.decisions[key] = self.decisions.get(key, 0) + 1
        self.last = decisions[-1] if decisions else self.last
        return decisions

    def prune(
        self,
        trees: Sequence[DraftTree],
        rows: Sequence[RowView],
        decisions: Sequence[Decision],
        step: StepShape,
        spent_s: float,
    ) -> list[DraftTree]:
        """Cut a step's drafts to what is worth its time; `spent_s` went into making them.

        Also notes what drafts are like before they are cut.
        """
        self._levels.clear()
        for tree, row, decision in zip(trees, rows, decisions, strict=True):
            if decision.arm != OFF:
                levels = max(tree.depths, default=1)
                self._levels[decision.arm] = max(levels, self._levels.get(decision.arm, 1))
                for profile in self._profiles(row.sequence_id, decision.arm):
                    profile.note(tree.values)
        return prune(trees, self._times.of(step), spent_s)

    def observe(
        self, outcomes: Sequence[Outcome], draft_s: Mapping[str, tuple[int, float]]
    ) -> None:
        """Learn from a step; `draft_s` has (sequences, seconds) by arm."""
        for arm, (count, seconds) in draft_s.items():
            self._draft_times[arm].note(count, self._levels.get(arm, 1), seconds)
        for outcome in outcomes:
            arm, tree = outcome.decision.arm, outcome.tree
            if arm == OFF or not tree.tokens:
                continue
            promised = sum(tree.values)
            for profile in self._profiles(outcome.sequence_id, arm):
                profile.settle(promised, len(outcome.path))
            self._calibrate(self._sequences[outcome.sequence_id].domain, outcome)

    def retire(self, arms: Collection[str]) -> None:
        """Choose these arms no more; what the running step still has of them may be observed."""
        self._arms = tuple(arm for arm in self._arms if arm not in arms)
        self._ranked = _ranked(self._arms)
        for sequence in self._sequences.values():
            sequence.choice = None

    def add(self, arms: Sequence[str]) -> None:
        """Choose among these arms too, between two steps; the others keep what is known of them.

        What was known of retired arms is forgotten.
        """
        self._arms += tuple(arm for arm in arms if arm not in self._arms)
        self._ranked = _ranked(self._arms)
        kept = set(self._arms)
        _keep(self._draft_times, kept, DraftTimes)
        _keep(self._levels, kept)
        for known in self._known():
            _keep(known.profiles, kept, lambda: Profile(_DOMAIN_RATE))
            _keep(known.calibrations, {part for arm in kept for part in arm.split("+")})
        for sequence in self._sequences.values():
            _keep(sequence.profiles, kept)
            sequence.choice = None
        for key in [key for key in self.decisions if key[0] not in kept | {OFF}]:
            del self.decisions[key]

    def renew(self, arms: Collection[str]) -> None:
        """Try these arms as if they were new: they draft with other weights."""
        parts = {part for arm in arms for part in arm.split("+")}
        for known in self._known():
            for arm in arms:
                known.profiles[arm].renew()
            for part in parts & known.calibrations.keys():
                known.calibrations[part] = known.calibrations[part].copy()
        for sequence in self._sequences.values():
            _keep(sequence.profiles, sequence.profiles.keys() - arms)
            sequence.choice = None

    def forget(self, sequence_id: int) -> None:
        """Let go of a sequence."""
        self._sequences.pop(sequence_id, None)

    def _decide(self, row: RowView, times: NodeCurve, may_explore: bool) -> Decision:
        sequence = self._sequence(row)
        if row.depth < 1:
            return Decision(OFF, OFF)
        if row.mode != "AUTO":
            if row.mode not in self._arms:
                return Decision(OFF, OFF)
            return self._decision(row, sequence, self._forced(sequence, row.mode, times), "forced")
        kept = sequence.choice
        if kept is not None and kept.rounds_left and kept.num_rows == times.rows:
            choice = kept
        else:
            choice = sequence.choice = self._choose(sequence, times)
        choice.rounds_left -= 1
        if may_explore:
            other = self._explored(sequence, choice, times)
            if other is not None:
                return self._decision(row, sequence, other, "explore")
        if choice.arm == OFF:
            return Decision(OFF, OFF, None, choice.off_rate, choice.off_rate)
        return self._decision(row, sequence, choice, "on")

    def _decision(
        self, row: RowView, sequence: _Sequence, choice: _Choice, reason: str
    ) -> Decision:
        calibration = sequence.domain.calibration
        budget = DraftBudget(
            nodes=min(self._max_nodes, choice.nodes),
            depth=min(self._max_depth, row.depth),
            threshold=choice.threshold,
            calibration=calibration(choice.arm),
            calibration_of=calibration,
        )
        return Decision(choice.arm, reason, budget, choice.rate, choice.off_rate)

    def _choose(self, sequence: _Sequence, times: NodeCurve) -> _Choice:
        """Return the arm and the size of the highest expected rate."""
        off_rate = times.rows / times.at(0)
        best_arm, best_rate, best_size = OFF, off_rate * _MARGIN, 0
        for arm, parts in self._ranked.items():
            rate, size = self._best_size(sequence.profile(arm), arm, times)
            is_part = best_arm != OFF and parts < self._ranked[best_arm]
            if rate > best_rate * (_DOUBT if is_part else 1.0):
                best_arm, best_rate, best_size = arm, rate, size
        if best_arm == OFF:
            return _Choice(OFF, 0, 1.0, off_rate, off_rate, times.rows)
        return self._sized(best_arm, best_size, best_rate, times)

    def _forced(self, sequence: _Sequence, arm: str, times: NodeCurve) -> _Choice:
        """Return the best size for an arm, which drafts even if no draft were faster."""
        profile = sequence.profile(arm)
        rate, size = self._best_size(profile, arm, times)
        if profile.num_drafts < _FIRST_TRIALS:
            size = self._max_nodes
        return self._sized(arm, size, rate, times)

    def _sized(self, arm: str, size: int, rate: float, times: NodeCurve) -> _Choice:
        rows = times.rows
        off_rate = rows / times.at(0)
        # What one more node must bring to be worth the time that it takes all rows.
        slope_s = _LENIENCE * times.slope(max(1, rows * min(size, _USUAL_SIZE)))
        # And what it must bring for the level that it lies on, often alone.
        slope_s += self._draft_times[arm].level_s(rows) / rows
        threshold = min(0.5, max(rate, off_rate) * slope_s)
        # With room for a draft that is better than the mean one.
        nodes = min(self._max_nodes, 2 * size + 2)
        return _Choice(arm, nodes, threshold, rate, off_rate, rows)

    def _best_size(self, profile: Profile, arm: str, times: NodeCurve) -> tuple[float, int]:
        """Return the best rate over the numbers of nodes per row, and that number."""
        rows, draft_s = times.rows, self._draft_times[arm].of(times.rows)
        trust = profile.trust
        emitted, best, size = 1.0, 0.0, 1
        for num, value in enumerate(profile.values[: self._max_nodes], 1):
            emitted += trust * value
            rate = rows * emitted / (times.at(rows * num) + draft_s)
            if rate > best:
                best, size = rate, num
        return best, size

    def _explored(self, sequence: _Sequence, choice: _Choice, times: NodeCurve) -> _Choice | None:
        """Return an arm to try in place of the chosen one, if there is time for it."""
        arms = [arm for arm in self._arms if arm != choice.arm]
        if not arms:
            return None
        num_drafts = {arm: sequence.domain.profiles[arm].num_drafts for arm in arms}
        arm = min(arms, key=num_drafts.__getitem__)
        cost_s = self._trial_s(sequence.domain.profiles[arm], arm, choice, times)
        is_new = self._all.profiles[arm].num_drafts < _FIRST_TRIALS
        if not is_new:
            if self._allowance_s < cost_s:
                return None
            self._allowance_s -= cost_s
        return self._sized(arm, self._max_nodes, choice.rate, times)

    def _trial_s(self, profile: Profile, arm: str, choice: _Choice, times: NodeCurve) -> float:
        """Return what trying an arm for one sequence costs: what it takes beside the step itself.

        Of an arm that is known well also what the chosen one would have brought in that time.
        """
        cost_s = self._draft_times[arm].of(1) + times.at(_USUAL_SIZE) - times.at(0)
        if profile.num_drafts < _KNOWN_DRAFTS:
            return cost_s
        rate, size = self._best_size(profile, arm, times)
        step_s = times.at(times.rows * size) + self._draft_times[arm].of(times.rows)
        return max(cost_s, step_s * (1.0 - rate / choice.rate) / times.rows)

    def _sequence(self, row: RowView) -> _Sequence:
        sequence = self._sequences.get(row.sequence_id)
        if sequence is None:
            sequence = self._sequences[row.sequence_id] = _Sequence(self._domain(row.domain))
        return sequence

    def _domain(self, name: str) -> _Domain:
        domain = self._domains.get(name)
        if domain is None:
            domain = self._domains[name] = _Domain(
                {arm: p.copy(_DOMAIN_RATE) for arm, p in self._all.profiles.items()},
                {drafter: c.copy() for drafter, c in self._all.calibrations.items()},
            )
            if len(self._domains) > _MAX_DOMAINS:
                self._domains.popitem(last=False)
        else:
            self._domains.move_to_end(name)
        return domain

    def _known(self) -> Iterable[_Domain]:
        """Return all that profiles are kept in, also domains that only a sequence still has."""
        domains = [*self._domains.values(), *(s.domain for s in self._sequences.values())]
        return {id(known): known for known in (self._all, *domains)}.values()

    def _profiles(self, sequence_id: int, arm: str) -> tuple[Profile, Profile, Profile]:
        """Return where something about an arm is to be noted."""
        sequence = self._sequences[sequence_id]
        own = sequence.profiles.get(arm)
        if own is None:
            own = sequence.profiles[arm] = sequence.domain.profiles[arm].copy(_SEQUENCE_RATE)
        return own, sequence.domain.profiles[arm], self._all.profiles[arm]

    def _calibrate(self, domain: _Domain, outcome: Outcome) -> None:
        """Count the nodes whose parent was accepted: those behind it were not put to the test."""
        tree = outcome.tree
        accepted = {ROOT, *outcome.path}
        for node, parent in enumerate(tree.parents):
            if parent in accepted and parent not in tree.proposals:
                for known in (domain, self._all):
                    known.calibration(tree.sources[node]).add(
                        tree.confidences[node], node in accepted
                    )


def _ranked(arms: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return the parts of arms, unions first: all that a part would draft is in them."""
    parts = {arm: frozenset(arm.split("+")) for arm in arms}
    return dict(sorted(parts.items(), key=lambda item: -len(item[1])))


def _keep(
    known: dict[str, Value], names: Collection[str], new: Callable[[], Value] | None = None
) -> None:
    """Forget all but some names; those that are missing get a new value, if there is such."""
    for name in known.keys() - names:
        del known[name]
    if new is not None:
        for name in names:
            if name not in known:
                known[name] = new()
