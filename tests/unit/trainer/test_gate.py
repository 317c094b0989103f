"""The gate: what it accepts, how often it errs, and how much text it takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.errors import InvalidRequestError
from paceline.trainer.forgetting import Forgetting, forgetting
from paceline.trainer.gate import (
    DomainScores,
    GateRules,
    NewScore,
    PairedScore,
    Verdict,
    judge,
)

POSITIONS = 64
Source = Callable[[np.random.Generator], PairedScore]


def drafts(gain: float, level: float = 0.5, positions: int = POSITIONS) -> Source:
    """Two drafts on a sequence of some difficulty; half of their luck is common."""

    def score(random: np.random.Generator) -> PairedScore:
        low = min(max(random.normal(level, 0.15), 0.02), 0.98 - max(gain, 0.0))
        high = min(max(low + random.normal(gain, 0.03), 0.0), 1.0)
        ours, theirs = random.random(positions), random.random(positions)
        theirs[: positions // 2] = ours[: positions // 2]
        return PairedScore(positions, float((ours < high).sum()), float((theirs < low).sum()))

    return score


def mostly_better(random: np.random.Generator) -> PairedScore:
    """A candidate that is a little better on most sequences and useless on a few; no gain."""
    is_useless = random.random() < 0.1
    return PairedScore(POSITIONS, 0.0 if is_useless else 0.5 * POSITIONS / 0.9, 0.5 * POSITIONS)


def run(source: Source, seed: int, rules: GateRules, batch: int = 32) -> tuple[Verdict, int]:
    """Look after every batch until there is a verdict; return it with the number of sequences."""
    random = np.random.default_rng(seed)
    scores: list[PairedScore] = []
    while True:
        scores += [source(random) for _ in range(batch)]
        verdict = judge([DomainScores("", scores)], rules)
        if verdict.is_final:
            return verdict, len(scores)


SHORT = GateRules(max_positions=256 * POSITIONS)


@pytest.mark.parametrize(
    "source",
    [drafts(0.0), drafts(GateRules().min_gain), mostly_better],
    ids=["equal", "too-small-a-gain", "skewed"],
)
def test_what_gains_nothing_is_accepted_with_probability_alpha_at_most(source: Source) -> None:
    num_runs, alpha = 150, SHORT.alpha
    num_accepted = sum(run(source, seed, SHORT)[0].is_accepted for seed in range(num_runs))
    assert num_accepted <= num_runs * alpha + 2 * math.sqrt(num_runs * alpha * (1 - alpha))


def test_a_gain_of_five_points_is_seen_within_some_two_hundred_sequences() -> None:
    found = [run(drafts(0.05), seed, GateRules()) for seed in range(20)]
    assert all(verdict.is_accepted for verdict, _ in found)
    assert max(num for _, num in found) <= 224


def test_what_is_worse_is_refused_long_before_the_end() -> None:
    found = [run(drafts(-0.05), seed, GateRules()) for seed in range(10)]
    assert {verdict.reason for verdict, _ in found} <= {"no-gain", "forgets"}
    assert max(num for _, num in found) <= 224


def test_without_a_verdict_in_time_it_is_refused() -> None:
    verdict, num = run(drafts(0.01), 0, SHORT)
    assert (verdict.reason, num) == ("no-gain", 256)


def domains(random: np.random.Generator, num: int, **gains: float) -> list[DomainScores]:
    return [
        DomainScores(name, [drafts(gain)(random) for _ in range(num)])
        for name, gain in gains.items()
    ]


def test_a_domain_that_is_forgotten_outweighs_any_gain() -> None:
    random = np.random.default_rng(0)
    forgotten = domains(random, 500, a=0.2, b=0.2, c=-0.1)
    verdict = judge(forgotten)
    assert (verdict.is_accepted, verdict.reason) == (False, "forgets")
    assert [score.domain for score in verdict.scores] == ["", "a", "b", "c"]
    assert verdict.scores[0].difference_low > GateRules().min_gain
    kept = judge(domains(random, 500, a=0.2, b=0.2, c=0.0))
    assert kept.is_accepted, kept.detail


def test_a_mean_below_is_enough_where_there_is_enough_text() -> None:
    flat = [PairedScore(64, 40, 32)] * 200
    losing = [PairedScore(64, 26, 32), PairedScore(64, 31, 32)] * 10
    few = [DomainScores("a", flat), DomainScores("b", losing)]
    assert judge(few).reason == "undecided"
    many = [DomainScores("a", flat), DomainScores("b", losing * 16)]
    assert judge(many, GateRules(enough_positions=2048)).reason == "forgets"
    # So little text that it can never tell does not hold up the others.
    over = GateRules(max_positions=200 * 64)
    assert judge(few, over).reason == "better"


def test_traffic_decides_what_a_domain_counts() -> None:
    random = np.random.default_rng(1)
    gains, losses = domains(random, 400, a=0.1, b=-0.025)
    assert judge([gains, losses]).is_accepted
    rare = DomainScores("a", gains.scores, weight=0.1)
    verdict = judge([rare, losses])
    assert not verdict.is_accepted
    total = verdict.scores[0]
    weights = {"a": 0.1, "b": 1.0}
    expected = sum(
        weights[score.domain] * (score.acceptance - score.incumbent_acceptance)
        for score in verdict.scores[1:]
    ) / sum(weights.values())
    assert total.acceptance - total.incumbent_acceptance == pytest.approx(expected)


SCORES = st.lists(
    st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.floats(0, n), st.floats(0, n))),
    max_size=30,
)


@given(raw=st.dictionaries(st.sampled_from(["", "a", "b"]), SCORES))
def test_figures_are_those_of_plain_sums(raw: dict[str, list[tuple[int, float, float]]]) -> None:
    verdict = judge([DomainScores(d, [PairedScore(*s) for s in ss]) for d, ss in raw.items()])
    total = verdict.scores[0]
    flat = np.array([s for ss in raw.values() for s in ss]).reshape(-1, 3)
    assert total.num_positions == flat[:, 0].sum()
    if len(flat):
        assert total.acceptance == pytest.approx(flat[:, 1].sum() / flat[:, 0].sum())
        weights = np.minimum(flat[:, 0] / 64, 1)
        mean = (weights * (flat[:, 1] - flat[:, 2]) / flat[:, 0]).sum() / weights.sum()
        assert total.difference_low - 1e-9 <= mean <= total.difference_high + 1e-9
    assert [s.domain for s in verdict.scores[1:]] == sorted(d for d, ss in raw.items() if ss)
    if verdict.is_accepted:
        assert total.difference_low > GateRules().min_gain


def test_no_text_is_no_verdict() -> None:
    assert judge([]).reason == judge([DomainScores("a", [])]).reason == "undecided"


@pytest.mark.parametrize(
    "domain",
    [
        DomainScores("", [PairedScore(0, 0, 0)]),
        DomainScores("", [PairedScore(4, 5, 0)]),
        DomainScores("", [PairedScore(4, 0, float("nan"))]),
        DomainScores("", [PairedScore(4, 1, 1)], weight=0.0),
    ],
)
def test_impossible_scores_are_refused(domain: DomainScores) -> None:
    with pytest.raises(InvalidRequestError):
        judge([domain])


def test_a_verdict_is_one_of_the_named_reasons() -> None:
    reasons = Counter(run(drafts(gain), 1, SHORT)[0].reason for gain in (-0.1, 0.0, 0.2))
    assert set(reasons) == {"no-gain", "better"}


def test_forgetting_is_measured_against_the_best_and_the_beginning() -> None:
    history = [{"a": 0.4}, {"a": 0.6, "b": 0.3}, {"a": 0.5}, {"b": 0.2}]
    found = forgetting(history)
    assert found == {"a": Forgetting(0.5, 0.6, 0.4), "b": Forgetting(0.2, 0.3, 0.3)}
    assert found["a"].forgotten == pytest.approx(0.1)
    assert found["a"].transferred == pytest.approx(0.1)
    assert found["b"].transferred == pytest.approx(-0.1)
    assert forgetting([]) == {}


def new_scores(gains: list[float], seed: int = 0, positions: int = 40) -> list[NewScore]:
    random = np.random.default_rng(seed)
    return [NewScore("b", drafts(gain, 0.3, positions)(random)) for gain in gains]


def test_a_change_of_traffic_shows_in_the_newest_sequences() -> None:
    held_out = [DomainScores("a", [PairedScore(64, 32.0, 32.0)] * 50)]
    before = [NewScore("a", PairedScore(64, 32.0, 32.0))] * 512
    assert judge(held_out, new=before).reason in ("no-gain", "undecided")
    verdict = judge(held_out, new=before + new_scores([0.2] * 64))
    assert verdict.is_accepted and verdict.scores[0].num_positions == 64 * 40
    # Held-out text that knows the old traffic only shows nothing.
    assert not judge(held_out).is_accepted


def test_a_small_gain_shows_on_many_sequences() -> None:
    assert judge([], new=new_scores([0.06] * 64)).reason == "undecided"
    verdict = judge([], new=new_scores([0.06] * 512))
    assert verdict.is_accepted and verdict.scores[0].num_positions == 512 * 40


def test_new_traffic_without_a_gain_is_accepted_with_probability_alpha_at_most() -> None:
    rules = GateRules()
    runs = [judge([], rules, new_scores([0.0] * 512, seed)) for seed in range(60)]
    assert sum(run.is_accepted for run in runs) <= 60 * rules.alpha + 3


def test_a_gain_on_new_traffic_does_not_pay_for_what_is_forgotten() -> None:
    new = new_scores([0.2] * 64)
    forgotten = [DomainScores("a", [PairedScore(64, 20.0, 32.0)] * 60)]
    assert judge(forgotten, new=new).reason == "forgets"
    # A few unlucky sequences are no evidence; more of them wait for more.
    few = [DomainScores("a", [PairedScore(64, 29.0, 32.0)] * 4)]
    assert judge(few, new=new).is_accepted
    more = [DomainScores("a", [PairedScore(64, 29.0, 32.0)] * 24)]
    verdict = judge(more, new=new)
    assert verdict.reason == "undecided" and "loses on 'a'" in verdict.detail
