"""Places for running requests: bounded, given back however a request ends, ids unique."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.errors import AlreadyExistsError, ExhaustedError, UnavailableError
from paceline.gateway.admission import Admission


def test_places_are_bounded_and_the_excess_is_told_when_to_come_back() -> None:
    admission = Admission(2)
    with admission.admit("", "a"), admission.admit("", "b"):
        with pytest.raises(ExhaustedError) as error, admission.admit("", "c"):
            pass
        assert error.value.retry_after_s > 0
        assert error.value.reason == "queue-full"
        assert admission.num_running == 2
    assert admission.num_running == 0


def test_ids_are_unique_within_a_tenant_while_they_run() -> None:
    admission = Admission(10)
    with admission.admit("a", "same"), admission.admit("b", "same"):
        with pytest.raises(AlreadyExistsError, match="same"), admission.admit("a", "same"):
            pass
        assert admission.num_running == 2
    with admission.admit("a", "same"):
        pass


@pytest.mark.parametrize(
    ("error", "finished", "failed"),
    [
        (None, 1, 0),
        (UnavailableError("x"), 0, 1),
        (RuntimeError("x"), 0, 1),
        (asyncio.CancelledError(), 0, 0),
        (GeneratorExit(), 0, 0),
    ],
)
def test_a_place_is_given_back_however_a_request_ends(
    error: BaseException | None, finished: int, failed: int
) -> None:
    admission = Admission(1)
    try:
        with admission.admit("", "a"):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    assert admission.num_running == 0
    assert (admission.num_finished, admission.num_failed) == (finished, failed)


@given(
    steps=st.lists(st.tuples(st.booleans(), st.sampled_from("ab"), st.integers(0, 3)), max_size=40),
    places=st.integers(1, 4),
)
def test_the_books_match_a_plain_set(steps: list[tuple[bool, str, int]], places: int) -> None:
    admission, held = Admission(places), dict[tuple[str, int], ExitStack]()
    for is_entering, tenant, number in steps:
        entry = (tenant, number)
        if not is_entering:
            if entry in held:
                held.pop(entry).close()
        else:
            exits = ExitStack()
            try:
                exits.enter_context(admission.admit(tenant, str(number)))
            except AlreadyExistsError:
                assert entry in held
            except ExhaustedError:
                assert entry not in held and len(held) == places
            else:
                assert entry not in held and len(held) < places
                held[entry] = exits
        assert admission.num_running == len(held)
    for exits in held.values():
        exits.close()
