"""Suspicion as a pure book: time is an argument."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from paceline.gateway.suspects import (
    MAX_RETRY_S,
    MAX_SUSPECT_S,
    RETRY_S,
    SUSPECT_S,
    Suspects,
)

WORKER, OTHER = ("decode-0", 5), ("decode-0", 6)


def test_nobody_is_suspect_at_first() -> None:
    suspects = Suspects()
    assert not suspects.is_suspect(WORKER, 0.0)
    assert suspects.may_retry(WORKER, 0.0)
    assert not suspects.needs_probe(WORKER)


def test_a_break_makes_an_incarnation_suspect_and_not_its_successor() -> None:
    suspects = Suspects()
    suspects.note_break(WORKER, 10.0)
    assert suspects.is_suspect(WORKER, 10.0)
    assert suspects.needs_probe(WORKER)
    assert not suspects.is_suspect(OTHER, 10.0)


def test_time_alone_does_not_clear_a_worker_that_does_not_answer() -> None:
    suspects = Suspects()
    suspects.note_break(WORKER, 0.0)
    assert suspects.is_suspect(WORKER, 1e6)
    assert not suspects.may_retry(WORKER, 1e6)
    suspects.note_answer(WORKER)
    assert not suspects.is_suspect(WORKER, 1e6)


def test_one_that_answers_may_be_tried_soon_and_is_preferred_later() -> None:
    suspects = Suspects()
    suspects.note_break(WORKER, 0.0)
    suspects.note_answer(WORKER)
    assert not suspects.needs_probe(WORKER)
    assert not suspects.may_retry(WORKER, RETRY_S / 2)
    assert suspects.may_retry(WORKER, RETRY_S)
    assert suspects.is_suspect(WORKER, SUSPECT_S / 2)
    assert not suspects.is_suspect(WORKER, SUSPECT_S)


def test_a_break_behind_an_answer_asks_for_another() -> None:
    suspects = Suspects()
    suspects.note_break(WORKER, 0.0)
    suspects.note_answer(WORKER)
    suspects.note_break(WORKER, 0.01)
    assert suspects.needs_probe(WORKER)
    assert not suspects.may_retry(WORKER, 1.0)


def test_breaks_of_one_moment_count_once() -> None:
    suspects = Suspects()
    for i in range(20):
        suspects.note_break(WORKER, 0.001 * i)
    suspects.note_answer(WORKER)
    assert suspects.may_retry(WORKER, RETRY_S)


def test_waits_double_up_to_a_limit_and_trust_ends_them() -> None:
    suspects, now_s, waits = Suspects(), 0.0, []
    for _ in range(12):
        suspects.note_break(WORKER, now_s)
        suspects.note_answer(WORKER)
        start_s = now_s
        while not suspects.may_retry(WORKER, now_s):
            now_s += RETRY_S / 4
        waits.append(now_s - start_s)
    for earlier, later in pairwise(waits):
        assert later >= min(1.5 * earlier, MAX_RETRY_S)
    assert MAX_RETRY_S <= waits[-1] < MAX_RETRY_S + RETRY_S
    assert suspects.is_suspect(WORKER, now_s + MAX_SUSPECT_S - MAX_RETRY_S - 1)
    suspects.trust(WORKER)
    assert not suspects.is_suspect(WORKER, now_s)
    suspects.note_break(WORKER, now_s)
    suspects.note_answer(WORKER)
    assert suspects.may_retry(WORKER, now_s + RETRY_S)


def test_who_left_is_forgotten() -> None:
    suspects = Suspects()
    suspects.note_break(WORKER, 0.0)
    suspects.note_break(OTHER, 0.0)
    suspects.retain({OTHER})
    assert not suspects.is_suspect(WORKER, 0.0)
    assert suspects.is_suspect(OTHER, 0.0)
    suspects.note_answer(WORKER)
    suspects.trust(WORKER)


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["break", "answer", "trust"]), st.floats(0, 5)), max_size=30
    )
)
def test_a_worker_that_is_not_suspect_may_always_be_tried(events: list[tuple[str, float]]) -> None:
    suspects, now_s = Suspects(), 0.0
    for event, pause_s in events:
        now_s += pause_s
        if event == "break":
            suspects.note_break(WORKER, now_s)
            assert suspects.is_suspect(WORKER, now_s)
        elif event == "answer":
            suspects.note_answer(WORKER)
        else:
            suspects.trust(WORKER)
        if not suspects.is_suspect(WORKER, now_s):
            assert suspects.may_retry(WORKER, now_s)
        if suspects.needs_probe(WORKER):
            assert not suspects.may_retry(WORKER, now_s + 1e6)
