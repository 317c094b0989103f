"""What serving leaves for training survives the wire; samples that do not fit are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.learnings import Sample, SequenceOutcome
from paceline.rpc.draft_codec import (
    outcome_from_proto,
    outcome_to_proto,
    sample_from_proto,
    sample_to_proto,
)
from paceline.v1 import samples_pb2

COUNTS = st.integers(0, 2**32 - 1)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    context, count = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    top, hidden = draw(st.integers(1, 4)), draw(st.integers(0, 3))

    def array(dtype: str, *shape: int) -> bytes:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return draw(st.binary(min_size=size, max_size=size))

    return Sample(
        tenant=draw(st.binary(max_size=8)),
        domain=draw(st.text(max_size=8)),
        draft_version=draw(st.text(max_size=8)),
        temperature=draw(st.floats(0, 100, width=32)),
        first_position=draw(COUNTS),
        token_ids=tuple(draw(st.lists(COUNTS, min_size=context + count, max_size=context + count))),
        num_context=context,
        top=top,
        top_ids=array("<i4", count, top),
        top_probs=array("<f2", count, top),
        tail_mass=array("<f2", count),
        origins=array("u1", count),
        hidden=array("<f2", count, hidden),
    )


@given(samples())
def test_samples_survive(sample: Sample) -> None:
    wire = sample_to_proto(sample).SerializeToString()
    assert sample_from_proto(samples_pb2.Sample.FromString(wire)) == sample


OUTCOMES = st.builds(
    SequenceOutcome,
    drafter=st.text(),
    draft_version=st.text(),
    tenant=st.binary(),
    domain=st.text(),
    num_rounds=COUNTS,
    num_tried=COUNTS,
    num_accepted=COUNTS,
    num_emitted=COUNTS,
)


@given(OUTCOMES)
def test_outcomes_survive(outcome: SequenceOutcome) -> None:
    wire = outcome_to_proto(outcome).SerializeToString()
    assert outcome_from_proto(samples_pb2.SequenceOutcome.FromString(wire)) == outcome


BROKEN = {
    "no-context": {"num_context": 0},
    "context-only": {"num_context": 4},
    "more-context-than-tokens": {"num_context": 9},
    "no-distribution": {"top": 0},
    "top_ids": {"top_ids": bytes(15)},
    "top_probs": {"top_probs": bytes(10)},
    "tail_mass": {"tail_mass": b""},
    "origins": {"origins": bytes(3)},
    "hidden": {"hidden": bytes(7)},
    "tokens": {"token_ids": [1, 2, 3]},
}


@pytest.mark.parametrize("case", BROKEN)
def test_parts_that_do_not_fit_are_refused(case: str) -> None:
    good = samples_pb2.Sample(
        token_ids=[1, 2, 3, 4],
        num_context=2,
        top=2,
        top_ids=bytes(16),
        top_probs=bytes(8),
        tail_mass=bytes(4),
        origins=bytes(2),
        hidden=bytes(8),
    )
    sample_from_proto(good)
    for field, value in BROKEN[case].items():
        good.ClearField(field)  # type: ignore[arg-type]
        good.MergeFrom(samples_pb2.Sample(**{field: value}))  # type: ignore[arg-type]
    # What is wrong is named where a part alone is.
    match = case if case in Sample.__dataclass_fields__ else None
    with pytest.raises(ValueError, match=match):
        sample_from_proto(good)
