"""Earlier places of a suffix are all those that a search through the texts finds."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.spec.drafters.suffixes import LONGEST, TEXT_TOKENS, SuffixIndex

TOKENS = st.lists(st.integers(0, 3), max_size=30)
Place = tuple[tuple[int, ...], int, int]


def found(index: SuffixIndex, suffix: list[int], other_than: int | None = None) -> set[Place]:
    places = index.find(suffix, 10_000, other_than)
    assert len({(id(tokens), end) for tokens, end, _ in places}) == len(places)
    return {(tuple(tokens), end, length) for tokens, end, length in places}


def searched(texts: list[list[int]], suffix: list[int]) -> set[Place]:
    places: set[Place] = set()
    for text in texts:
        for end in range(1, len(text)):
            lengths = [
                n
                for n in range(1, min(LONGEST, end, len(suffix)) + 1)
                if text[end - n : end] == suffix[-n:]
            ]
            if lengths:
                places.add((tuple(text), end, max(lengths)))
    return places


@settings(deadline=None)
@given(pieces=st.lists(st.tuples(st.integers(0, 2), TOKENS), max_size=8), suffix=TOKENS)
def test_every_place_is_found_however_streams_interleave(
    pieces: list[tuple[int, list[int]]], suffix: list[int]
) -> None:
    index = SuffixIndex()
    streams: dict[int, list[int]] = {}
    for stream, tokens in pieces:
        index.append(stream, tokens)
        streams.setdefault(stream, []).extend(tokens)
    assert index.num_tokens == sum(map(len, streams.values()))
    assert found(index, suffix) == searched(list(streams.values()), suffix)
    others = [text for stream, text in streams.items() if stream != 1]
    assert found(index, suffix, other_than=1) == searched(others, suffix)


@settings(deadline=None)
@given(texts=st.lists(TOKENS.filter(bool), min_size=1, max_size=6), suffix=TOKENS, data=st.data())
def test_texts_that_were_dropped_are_gone_and_the_others_stay(
    texts: list[list[int]], suffix: list[int], data: st.DataObject
) -> None:
    index = SuffixIndex()
    for stream, tokens in enumerate(texts):
        index.append(stream, tokens)
        index.close(stream)
    num_dropped = data.draw(st.integers(0, len(texts)))
    for _ in range(num_dropped):
        index.drop_oldest()
    left = texts[num_dropped:]
    assert index.num_tokens == sum(map(len, left))
    assert found(index, suffix) == searched(left, suffix)
    runs = {tuple(t[end - n : end]) for t in left for n in (5, 2, 1) for end in range(n, len(t))}
    assert index.num_entries == len(runs)


@settings(deadline=None)
@given(pieces=st.lists(st.tuples(st.integers(0, 2), TOKENS, st.booleans()), max_size=12))
def test_interleaved_streams_lose_only_what_is_dropped(
    pieces: list[tuple[int, list[int], bool]],
) -> None:
    index = SuffixIndex()
    kept: dict[int, list[int]] = {}
    for stream, tokens, is_dropping in pieces:
        index.append(stream, tokens)
        if tokens:
            kept.setdefault(stream, []).extend(tokens)
        if is_dropping and kept:
            index.drop_oldest()
            del kept[next(iter(kept))]
    assert index.num_tokens == sum(map(len, kept.values()))
    for last in range(4):
        # Places behind one that was dropped may be lost, never invented.
        assert found(index, [last]) <= searched(list(kept.values()), [last])
    while kept:
        index.drop_oldest()
        kept.popitem()
    assert index.num_tokens == 0 and index.num_entries == 0


def test_a_stream_longer_than_a_text_is_found_across_the_seam() -> None:
    tokens = random.Random(0).sample(range(10**6), 3 * TEXT_TOKENS)
    index = SuffixIndex()
    for at in range(0, len(tokens), 7):
        index.append(0, tokens[at : at + 7])
    for end in range(LONGEST, len(tokens)):
        (place,) = index.find(tokens[end - LONGEST : end], 10)
        assert place[0][place[1]] == tokens[end] and place[2] == LONGEST
    # Dropping the first text leaves the rest, of which LONGEST tokens were carried over.
    index.drop_oldest()
    assert index.find(tokens[TEXT_TOKENS - 12 : TEXT_TOKENS - 9], 10) == []
    assert len(index.find(tokens[TEXT_TOKENS : TEXT_TOKENS + 5], 10)) == 1
