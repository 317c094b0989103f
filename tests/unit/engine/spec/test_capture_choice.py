"""Who is captured, how much, and at what cost; without an engine, and with a clock that stands."""

from __future__ import annotations

import random
from collections.abc import Sequence as Several
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.learnings import Sample, TokenOrigin
from paceline.domain.request import GenerationSpec
from paceline.engine.page_table import PageTable
from paceline.engine.request import Request, Sequence
from paceline.engine.spec.capture import (
    CONTEXT_TOKENS,
    MIN_TOKENS,
    WINDOW_TOKENS,
    Capture,
    Counts,
    need,
)
from paceline.engine.spec.tree import EMPTY_TREE, ROOT, DraftTree
from paceline.engine.step import (
    NOTHING,
    Captured,
    Row,
    RowResult,
    SampledToken,
    SampleSpec,
    StepPlan,
    StepResult,
)

STEP_S = 0.02
ROW_S = 0.001
"""What recording a row takes."""


class Rig:
    """Steps of sequences that a Capture watches."""

    def __init__(self, share: float = 0.005, top: int = 2) -> None:
        self.clock_s = 0.0
        self.capture = Capture(
            share=share, top=top, clock_s=lambda: self.clock_s, version_of=lambda id_: f"v{id_}"
        )
        self.sequences: dict[int, Sequence] = {}
        self._num_added = 0
        self.samples: list[Sample] = []
        self.steps_s = self.spent_s = 0.0
        self.num_recorded: list[int] = []

    def add(self, domain: str = "", *, allow: bool = True, prompt: int = 5) -> Sequence:
        self._num_added += 1
        id_ = self._num_added
        spec = GenerationSpec(
            *(f"{id_}", tuple(range(id_ * 100_000, id_ * 100_000 + prompt))),
            max_tokens=100_000,
            domain=domain,
            allow_training=allow,
        )
        request = Request(spec, key=b"", root=b"", arrival=id_)
        sequence = Sequence(id_, request, 0, list(spec.prompt_token_ids))
        self.sequences[id_] = sequence
        self.capture.admit(sequence)
        return sequence

    def step(
        self,
        trees: dict[int, tuple[DraftTree, tuple[int, ...]]] | None = None,
        idle: Several[int] = (),
    ) -> frozenset[int]:
        """Run a step of all sequences but the idle ones; return who was recorded."""
        rows = [self._row(s, (trees or {}).get(s.id, (EMPTY_TREE, ()))[0], idle) for s in self._all]
        plan = self.capture.choose(StepPlan(tuple(rows)))
        chosen = plan.captured.sequence_ids
        results, advanced = [], []
        for row in rows:
            if row.sample is None:
                results.append(NOTHING)
                continue
            path = (trees or {}).get(row.sequence_id, (EMPTY_TREE, ()))[1]
            sequence = self.sequences[row.sequence_id]
            start = len(sequence.token_ids)
            tokens = tuple(
                SampledToken(row.sequence_id * 100_000 + start + i) for i in range(1 + len(path))
            )
            captured = self._captured(tokens) if row.sequence_id in chosen else None
            results.append(RowResult(tokens, path, captured=captured))
            sequence.token_ids += [token.token_id for token in tokens]
            advanced.append((sequence, tokens))
        capture_s = ROW_S * len(chosen)
        result = StepResult(tuple(results), STEP_S + capture_s, capture_s=capture_s)
        self.capture.observe(plan, result, advanced)
        self.take()
        self.steps_s += STEP_S
        self.num_recorded.append(len(chosen))
        return chosen

    def take(self) -> None:
        samples, spent_s = self.capture.take()
        self.samples += samples
        self.spent_s += spent_s

    @property
    def _all(self) -> list[Sequence]:
        return list(self.sequences.values())

    def _row(self, sequence: Sequence, tree: DraftTree, idle: Several[int]) -> Row:
        spec = sequence.request.spec
        sample = SampleSpec(spec.sampling, 0, len(sequence.token_ids), 0)
        is_idle = sequence.id in idle
        return Row(
            sequence.id,
            (sequence.token_ids[-1],),
            len(sequence.token_ids) - 1,
            PageTable().ids,
            None if is_idle else sample,
            tree,
        )

    def _captured(self, tokens: tuple[SampledToken, ...]) -> Captured:
        ids = b"".join(token.token_id.to_bytes(4, "little") * 2 for token in tokens)
        return Captured(len(tokens), ids, bytes(4 * len(tokens)), bytes(2 * len(tokens)))


def chain(length: int) -> DraftTree:
    return DraftTree(tokens=(1,) * length, parents=tuple(range(-1, length - 1)))


def test_the_allowance_bounds_the_cost_over_time() -> None:
    rig = Rig(share=0.005)
    for _ in range(3):
        rig.add()
    window_s = WINDOW_TOKENS * ROW_S
    for _ in range(12_000):
        rig.step()
        # The first window tells what one costs; all others are paid for when they begin.
        assert rig.spent_s <= 0.005 * rig.steps_s * 1.001 + window_s
    assert rig.spent_s > 0.9 * 0.005 * rig.steps_s
    assert max(rig.num_recorded) <= 4
    assert len(rig.samples) > 10


def test_time_that_nobody_could_use_is_not_saved_up_for_long() -> None:
    rig = Rig(share=0.5)
    first = rig.add()
    for _ in range(WINDOW_TOKENS):
        rig.step()
    rig.capture.forget(first)
    del rig.sequences[first.id]
    rig.sequences[99] = Sequence(99, first.request, 0, [1])
    for _ in range(1000):
        rig.step()
    spent_s = rig.spent_s
    for _ in range(20):
        rig.sequences.pop(99, None)
        rig.add()
    rig.step()
    # Four windows' worth at most, one begun a step.
    for _ in range(8):
        rig.step()
    assert max(rig.num_recorded[-8:]) <= 5
    assert rig.spent_s > spent_s


def test_nothing_is_captured_while_it_costs_too_much() -> None:
    rig = Rig(share=0.005)
    rig.add()
    for _ in range(WINDOW_TOKENS):
        assert rig.step()
    pause = 0
    while not rig.step():
        pause += 1
    # 64 ms were spent and as much must be there again, at 0.1 ms a step.
    assert 1200 < pause < 1300


def test_the_time_of_choosing_and_bookkeeping_counts() -> None:
    rig = Rig(share=0.005)
    rig.add()
    ticks = iter(range(10**9))
    rig.capture._clock_s = lambda: next(ticks) * 1e-5  # type: ignore[method-assign]
    for _ in range(WINDOW_TOKENS):
        rig.step()
    # Two spans of one tick in each step beside what recording took.
    assert rig.spent_s == pytest.approx(WINDOW_TOKENS * (ROW_S + 2e-5), rel=0.01)


def test_without_permission_nothing_is_known() -> None:
    rig = Rig(share=1.0)
    rig.add(allow=False)
    for _ in range(200):
        assert not rig.step()
    assert rig.capture.num_sequences == 0
    assert rig.samples == []
    assert rig.spent_s == 0.0


@pytest.mark.parametrize("prompt", [1, 100, CONTEXT_TOKENS, 500])
def test_windows_are_contiguous_and_bounded(prompt: int) -> None:
    rig = Rig(share=1.0)
    sequence = rig.add(prompt=prompt)
    for _ in range(1000):
        rig.step()
    rig.capture.forget(sequence)
    rig.take()
    assert len(rig.samples) >= 3
    end = 0
    for sample in rig.samples:
        first = sample.first_position
        assert sample.token_ids == tuple(sequence.token_ids[first : first + len(sample.token_ids)])
        assert 1 <= sample.num_context <= CONTEXT_TOKENS
        assert MIN_TOKENS <= sample.num_captured <= WINDOW_TOKENS
        begin = first + sample.num_context
        assert begin >= end
        assert sample.num_context == min(begin, CONTEXT_TOKENS)
        end = begin + sample.num_captured
        # Each entry is that of its token.
        named = [sample.top_ids[i : i + 4] for i in range(0, len(sample.top_ids), 8)]
        captured = sample.token_ids[sample.num_context :]
        assert [int.from_bytes(each, "little") for each in named] == list(captured)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_origins_and_arrays_follow_the_accepted_paths(seed: int) -> None:
    rng = random.Random(seed)
    rig = Rig(share=1.0)
    sequence = rig.add()
    expected: list[int] = []
    while not rig.samples:
        nodes = rng.randint(0, 5)
        accepted = rng.randint(0, nodes)
        rig.step({sequence.id: (chain(nodes), tuple(range(accepted)))})
        last = TokenOrigin.BONUS if accepted == nodes else TokenOrigin.CORRECTED
        expected += [TokenOrigin.ACCEPTED] * accepted + [last if nodes else TokenOrigin.UNDRAFTED]
    (sample,) = rig.samples
    assert list(sample.origins) == expected[:WINDOW_TOKENS]
    assert sample.num_captured == WINDOW_TOKENS
    assert len(sample.top_ids) == 8 * WINDOW_TOKENS
    assert len(sample.top_probs) == 4 * WINDOW_TOKENS
    assert len(sample.tail_mass) == 2 * WINDOW_TOKENS
    assert sample.draft_version == f"v{sequence.id}"


def test_siblings_that_were_refused_make_a_correction() -> None:
    rig = Rig(share=1.0)
    sequence = rig.add()
    # Node 1 is accepted; the children of node 0 were never put to the test.
    tree = DraftTree(tokens=(1, 2, 3), parents=(ROOT, ROOT, 0))
    rig.step({sequence.id: (tree, (1,))})
    rig.step({sequence.id: (tree, (0,))})
    for _ in range(MIN_TOKENS):
        rig.step()
    rig.capture.forget(sequence)
    rig.take()
    accepted, corrected, bonus = TokenOrigin.ACCEPTED, TokenOrigin.CORRECTED, TokenOrigin.BONUS
    assert list(rig.samples[0].origins[:4]) == [accepted, bonus, accepted, corrected]


def test_domains_are_sampled_as_their_drafts_are_refused() -> None:
    rig = Rig(share=0.02)
    # Three sequences that draft well to one that drafts badly.
    for domain in ("well", "well", "well", "badly"):
        rig.add(domain)
    for i in range(6_000):
        right = {s.id: (chain(2), (0, 1)) for s in rig.sequences.values()}
        wrong = {s.id: (chain(2), ()) for s in rig.sequences.values()}
        rig.step({id_: (wrong if id_ == 4 or i % 4 == 0 else right)[id_] for id_ in right})
    num = {d: sum(s.domain == d for s in rig.samples) for d in ("well", "badly")}
    # All that was tried was refused, against one position in seven.
    assert 4 * num["well"] < num["badly"] < 9 * num["well"]


def test_a_row_that_is_not_drawn_from_is_not_recorded() -> None:
    rig = Rig(share=1.0)
    sequence = rig.add()
    assert rig.step() == {sequence.id}
    for _ in range(5):
        assert rig.step(idle=[sequence.id]) == frozenset()
    assert rig.step() == {sequence.id}
    for _ in range(MIN_TOKENS):
        rig.step()
    rig.capture.forget(sequence)
    rig.take()
    assert rig.samples[0].num_captured == MIN_TOKENS + 2


def test_ends_that_are_near_are_not_worth_a_window() -> None:
    rig = Rig(share=1.0)
    sequence = rig.add()
    spec = replace(sequence.request.spec, max_tokens=MIN_TOKENS - 1)
    sequence.request.spec = spec
    assert not rig.step()


COUNTS = st.builds(
    lambda tried, refused, samples: Counts(tried, tried - min(refused, tried), samples),
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.integers(0, 300),
)


@given(COUNTS, COUNTS)
def test_need_falls_with_samples_and_rises_with_refusals(domain: Counts, own: Counts) -> None:
    value = need(domain, own)
    assert all(0 < part <= 1 for part in value)
    # Domains come first: more samples of one outweigh whatever its sequences are like.
    assert need(replace(domain, samples=domain.samples + 1), Counts(5, 0)) < value
    assert need(domain, replace(own, samples=own.samples + 1)) < value
    if own.accepted:
        assert need(domain, replace(own, accepted=own.accepted - 1)) > value
    if domain.accepted:
        assert need(replace(domain, accepted=domain.accepted - 1), own) > value


def test_books_are_empty_when_all_have_ended() -> None:
    rig = Rig(share=1.0)
    for i in range(600):
        sequence = rig.add(f"{i}")
        rig.step()
        rig.capture.forget(sequence)
        rig.capture.forget(sequence)
        del rig.sequences[sequence.id]
    assert rig.capture.num_sequences == 0
    assert not rig.step()
