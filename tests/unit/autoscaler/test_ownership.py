"""Sizes that somebody else sets."""

from __future__ import annotations

from paceline.autoscaler.ownership import Ownership
from paceline.domain.member import Role

P, D = Role.PREFILL, Role.DECODE


def test_what_is_found_at_the_start_is_nobodys_change() -> None:
    ownership = Ownership("hold", 60)
    assert ownership.problems({P: 1, D: 5}, 0) == ()
    assert ownership.problems({P: 1, D: 5}, 1) == ()


def test_a_change_of_somebody_else_stands_for_a_while() -> None:
    ownership = Ownership("hold", 60)
    ownership.problems({P: 1, D: 5}, 0)
    (line,) = ownership.problems({P: 1, D: 2}, 10)
    assert line == "target-changed: somebody else set decode from 5 to 2; left alone for 60 s more"
    assert ownership.problems({P: 1, D: 2}, 69.5) != ()
    assert ownership.problems({P: 1, D: 2}, 70) == ()


def test_a_second_change_begins_the_while_again() -> None:
    ownership = Ownership("hold", 60)
    ownership.problems({D: 5}, 0)
    ownership.problems({D: 2}, 10)
    ownership.problems({D: 3}, 50)
    assert ownership.problems({D: 3}, 100) != ()
    assert ownership.problems({D: 3}, 110) == ()


def test_what_was_asked_for_here_is_no_change_of_others() -> None:
    ownership = Ownership("stop", 60)
    ownership.problems({D: 5}, 0)
    ownership.note_try(D, 3)
    ownership.note_applied(D, 3)
    assert ownership.problems({D: 3}, 1) == ()


def test_a_change_whose_answer_was_lost_is_our_own_whenever_it_shows() -> None:
    ownership = Ownership("stop", 60)
    ownership.problems({D: 5}, 0)
    ownership.note_try(D, 3)
    assert ownership.problems({D: 5}, 1) == ()
    assert ownership.problems({D: 3}, 2) == ()
    assert ownership.problems({D: 4}, 3) != ()


def test_stop_leaves_pools_alone_for_good() -> None:
    ownership = Ownership("stop", 60)
    ownership.problems({D: 5}, 0)
    ownership.problems({D: 2}, 10)
    assert ownership.problems({D: 2}, 1e6) != ()


def test_ignore_goes_on_at_once() -> None:
    ownership = Ownership("ignore", 60)
    ownership.problems({D: 5}, 0)
    assert ownership.problems({D: 2}, 10) == ()
