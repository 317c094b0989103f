"""Ways to draw that the kernels' sampling is tested with."""

from __future__ import annotations

from hypothesis import strategies as st

from paceline.domain.request import SamplingParams


def sampling_params(min_p: st.SearchStrategy[float]) -> st.SearchStrategy[SamplingParams]:
    """Any parameters without penalties, with extremes; `min_p` beside 0, 0.05 and 1."""
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1e-42, 1e-3, 0.5, 1.0, 1.0, 1.7, 1e30]),
        top_k=st.one_of(st.just(0), st.integers(1, 70), st.integers(1, 70_000)),
        top_p=st.one_of(
            st.just(1.0),
            st.sampled_from([1e-20, 0.25, 0.5, 0.9, 0.999999, 1.0 - 2**-53]),
            st.floats(0.01, 1.0),
        ),
        min_p=st.one_of(st.just(0.0), st.sampled_from([0.05, 1.0]), min_p),
        seed=st.integers(0, 2**64 - 1),
    )


PENALTIES = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.3, 1e-45]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.37, -0.1]),
    }
)
