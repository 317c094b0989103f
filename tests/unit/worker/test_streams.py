"""News of several steps merge without losing a token or a count."""

from __future__ import annotations

import asyncio
from itertools import groupby

from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.request import FinishReason, TokenChunk, TokenLogprobs
from paceline.worker.streams import RequestStream

STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.lists(st.integers(0, 4095), min_size=1, max_size=5),
        st.integers(0, 16),
        st.sampled_from(["", "v1", "v2"]),
        st.booleans(),
    ),
    max_size=30,
)


def chunk_of(index: int, ids: list[int], drafted: int, version: str) -> TokenChunk:
    return TokenChunk(
        index=index,
        token_ids=tuple(ids),
        logprobs=tuple(TokenLogprobs(token, -1.0) for token in ids),
        target_steps=1,
        drafted_tokens=drafted,
        accepted_tokens=len(ids) - 1,
        draft_version=version,
    )


@settings(max_examples=100)
@given(STEPS)
def test_whenever_it_is_read_a_stream_brings_what_was_put_in(
    steps: list[tuple[int, list[int], int, str, bool]],
) -> None:
    async def run() -> list[TokenChunk]:
        stream, got = RequestStream(), []
        updates = stream.updates()
        for *fields, is_read in steps:
            stream.add_chunk(chunk_of(*fields))  # type: ignore[arg-type]
            if is_read:
                got += (await anext(updates)).chunks
        stream.add_chunk(TokenChunk(0, (), finish_reason=FinishReason.STOP))
        stream.finish()
        async for update in updates:
            got += update.chunks
        return got

    def total(chunks: list[TokenChunk]) -> tuple[object, ...]:
        versions = [chunk.draft_version for chunk in chunks if chunk.draft_version]
        return (
            [token for chunk in chunks for token in chunk.token_ids],
            [entry.token_id for chunk in chunks for entry in chunk.logprobs],
            sum(chunk.target_steps for chunk in chunks),
            sum(chunk.drafted_tokens for chunk in chunks),
            sum(chunk.accepted_tokens for chunk in chunks),
            versions[-1:],
        )

    put = sorted((chunk_of(*fields[:-1]) for fields in steps), key=lambda c: c.index)
    got = sorted(asyncio.run(run()), key=lambda c: c.index)
    by_index = [{i: total(list(g)) for i, g in groupby(cs, lambda c: c.index)} for cs in (put, got)]
    assert {0: ([], [], 0, 0, 0, [])} | by_index[0] == by_index[1]
