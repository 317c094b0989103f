"""Up at once, down late; a bound on changes that holds for any signal."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from paceline.autoscaler.stabilise import DOWN_S, UP_PAUSE_S, Stabiliser


def run(stabiliser: Stabiliser, needs: list[int], current: int, period_s: float = 5.0) -> list[int]:
    sizes = []
    for i, need in enumerate(needs):
        current = stabiliser.settle(i * period_s, current, need)
        sizes.append(current)
    return sizes


def test_a_pool_grows_at_once() -> None:
    assert run(Stabiliser(), [1, 7], 1) == [1, 7]


def test_a_second_growth_waits_for_a_pause() -> None:
    assert run(Stabiliser(), [2, 3, 4, 5, 6], 1) == [2, 2, 2, 5, 5]


def test_a_pool_shrinks_after_a_quiet_window_by_halves() -> None:
    sizes = run(Stabiliser(down_s=60.0), [16] + [1] * 60, 16)
    assert sizes[12] == 16 and sizes[13] == 8
    assert sorted(set(sizes), reverse=True) == [16, 8, 4, 2, 1]


def test_it_shrinks_to_the_most_that_was_needed() -> None:
    sizes = run(Stabiliser(down_s=60.0), [10, *[3, 6] * 12], 10)
    assert sizes[-1] == 6


def test_the_first_window_is_waited_for() -> None:
    assert run(Stabiliser(), [0] * int(DOWN_S / 5), 9)[-1] == 9


signals = st.lists(st.integers(0, 40), min_size=1, max_size=720)


@given(
    st.one_of(
        signals,
        st.builds(
            lambda a, b, n: ([a] * n + [b] * n) * (720 // (2 * n)),
            *[st.integers(0, 40)] * 2,
            st.integers(1, 40),
        ),
    )
)
def test_changes_of_an_hour_are_bounded(needs: list[int]) -> None:
    sizes = [5, *run(Stabiliser(), needs, 5)]
    changes = [b - a for a, b in pairwise(sizes) if a != b]
    shrinks = sum(change < 0 for change in changes)
    assert shrinks <= 3600 / DOWN_S + 1
    assert len(changes) - shrinks <= 3600 / UP_PAUSE_S + 1
    turns = sum(a * b < 0 for a, b in pairwise(changes))
    assert turns <= 2 * (3600 / DOWN_S + 1)
