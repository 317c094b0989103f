"""Domain values survive the wire unchanged."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.cost import Curve, StepCost, StepCurves
from paceline.domain.request import (
    FinishReason,
    GenerationSpec,
    SamplingParams,
    TokenChunk,
    TokenLogprobs,
)
from paceline.rpc import codec
from paceline.v1 import inference_pb2, worker_pb2

TOKENS = st.integers(0, 2**32 - 1)
COUNTS = st.integers(0, 2**31 - 1)
REALS = st.floats(width=32, allow_nan=False)
DOUBLES = st.floats(allow_nan=False)

SAMPLING = st.builds(
    SamplingParams,
    temperature=REALS,
    top_k=COUNTS,
    top_p=REALS,
    min_p=REALS,
    repetition_penalty=REALS,
    presence_penalty=REALS,
    frequency_penalty=REALS,
    seed=st.integers(0, 2**64 - 1),
)
SPECS = st.builds(
    GenerationSpec,
    request_id=st.text(),
    prompt_token_ids=st.lists(TOKENS).map(tuple),
    sampling=SAMPLING,
    max_tokens=COUNTS,
    cache_salt=st.binary(),
    stop_token_ids=st.frozensets(TOKENS),
    ignore_eos=st.booleans(),
    logprobs=COUNTS,
    n=COUNTS,
    priority=st.integers(-(2**31), 2**31 - 1),
    speculation=st.text(min_size=1),
    is_seed_drawn=st.booleans(),
    domain=st.text(),
    allow_training=st.booleans(),
)
LOGPROBS = st.builds(
    TokenLogprobs,
    token_id=TOKENS,
    logprob=REALS,
    top=st.lists(st.tuples(TOKENS, REALS)).map(tuple),
)
CHUNKS = st.builds(
    TokenChunk,
    index=COUNTS,
    token_ids=st.lists(TOKENS).map(tuple),
    logprobs=st.lists(LOGPROBS).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    target_steps=COUNTS,
    drafted_tokens=COUNTS,
    accepted_tokens=COUNTS,
    draft_version=st.text(),
)


CURVES = st.dictionaries(COUNTS, DOUBLES, min_size=1).map(
    lambda points: Curve(tuple(sorted(points)), tuple(points[n] for n in sorted(points)))
)
CURVED = st.builds(StepCurves, CURVES, CURVES, CURVES, DOUBLES, DOUBLES, DOUBLES, CURVES, DOUBLES)


@settings(max_examples=40)
@given(SPECS)
def test_specs_survive(spec: GenerationSpec) -> None:
    data = codec.spec_to_proto(spec).SerializeToString()
    assert codec.spec_from_proto(worker_pb2.GenerationSpec.FromString(data)) == spec


@settings(max_examples=40)
@given(CHUNKS)
def test_chunks_survive(chunk: TokenChunk) -> None:
    data = codec.chunk_to_proto(chunk).SerializeToString()
    assert codec.chunk_from_proto(worker_pb2.TokenChunk.FromString(data)) == chunk


@settings(max_examples=40)
@given(st.dictionaries(COUNTS, st.lists(TOKENS).map(tuple)))
def test_resumed_outputs_survive(resumed: dict[int, tuple[int, ...]]) -> None:
    assert codec.resumed_from_proto(codec.resumed_to_proto(resumed)) == resumed


@settings(max_examples=40)
@given(st.builds(StepCost, DOUBLES, DOUBLES, DOUBLES, DOUBLES, st.none() | CURVED, DOUBLES))
def test_step_costs_survive(cost: StepCost) -> None:
    assert codec.step_cost_from_proto(codec.step_cost_to_proto(cost)) == cost


def test_unset_sampling_fields_get_the_defaults_of_the_contract() -> None:
    assert codec.sampling_from_proto(inference_pb2.SamplingParams()) == SamplingParams()


def test_an_unset_speculation_mode_is_auto() -> None:
    assert codec.spec_from_proto(worker_pb2.GenerationSpec()).speculation == "AUTO"


def test_a_finish_reason_of_a_newer_version_reads_as_not_ended() -> None:
    data = worker_pb2.TokenChunk(finish_reason=77).SerializeToString()  # type: ignore[arg-type]
    assert codec.chunk_from_proto(worker_pb2.TokenChunk.FromString(data)).finish_reason is None
