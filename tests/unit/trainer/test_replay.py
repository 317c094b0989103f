"""The replay buffer: bounded, fair, remembering, and strict about what is held out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.trainer.replay import OTHER, ReplayBuffer
from paceline.trainer.texts import Text

TOP, CONTEXT, CAPTURED = 4, 6, 10


def text(number: int, domain: str, context: int | None = None) -> Text:
    """A text; `context` names its prompt."""
    rng = np.random.default_rng(number)
    prompt = np.random.default_rng(10_000 + (number if context is None else context))
    tokens = np.concatenate((prompt.integers(0, 99, CONTEXT), rng.integers(0, 99, CAPTURED)))
    weights = np.zeros(CONTEXT + CAPTURED, np.float32)
    weights[CONTEXT - 1 : -1] = 1.0
    return Text(
        tokens.astype(np.int32),
        rng.integers(0, 99, (CAPTURED, TOP)).astype(np.int32),
        np.zeros((CAPTURED, TOP), np.float16),
        weights,
        float(number),
        CONTEXT - 1,
        np.ones(CONTEXT + CAPTURED, np.uint8),
        domain,
    )


SIZE = text(0, "a").nbytes


def drawn(buffer: ReplayBuffer, count: int, ratio: float) -> list[Text]:
    found = [buffer.draw(ratio) for _ in range(count)]
    assert None not in found
    return [one for one in found if one is not None]


@settings(deadline=None, max_examples=40)
@given(
    domains=st.lists(st.sampled_from("abcd"), min_size=1, max_size=200),
    room=st.integers(1, 60),
)
def test_memory_is_bounded_and_shared_fairly(domains: list[str], room: int) -> None:
    buffer = ReplayBuffer(room * SIZE, held_out_every=4)
    for i, domain in enumerate(domains):
        buffer.add(text(i, domain))
        assert buffer.num_bytes <= max(room, 1) * SIZE
    kept, came = buffer.counts(), Counter(domains)
    assert sum(kept.values()) * SIZE == buffer.num_bytes
    share = room // len(came)
    for domain, count in came.items():
        # Within its equal share a domain loses nothing, however much others bring.
        assert kept[domain] >= min(count, share)


def test_a_domain_that_fell_silent_is_not_forgotten() -> None:
    buffer = ReplayBuffer(100 * SIZE)
    for i in range(40):
        buffer.add(text(i, "old"))
    for i in range(40, 2000):
        buffer.add(text(i, "new"))
    assert buffer.counts()["old"] == 40
    domains = Counter(t.domain for t in drawn(buffer, 400, 0.5))
    # Half of the draws follow the traffic, the rest take both alike.
    assert 60 <= domains["old"] <= 140


def test_the_newest_are_kept_and_older_ones_are_a_fair_draw_of_all_before() -> None:
    ages: Counter[int] = Counter()
    texts = [text(i, "a") for i in range(200)]
    for seed in range(60):
        buffer = ReplayBuffer(20 * SIZE, seed=seed, held_out_every=10**9)
        for one in texts:
            buffer.add(one)
        kept = sorted(t.temperature for t in (buffer._shelves["a"].text_at(j) for j in range(20)))
        assert kept[10:] == list(range(190, 200))
        ages.update(int(i) // 38 for i in kept[:10])
    # 600 older ones from 190 places in 5 equal parts, each 120 on average, deviation about 10.
    assert len(ages) == 5 and all(80 <= count <= 160 for count in ages.values())


def test_answers_to_one_prompt_are_on_one_side() -> None:
    buffer = ReplayBuffer(1 << 30, held_out_every=4)
    for i in range(600):
        buffer.add(text(i, "a", context=i % 60))

    def contexts(texts: list[Text]) -> set[bytes]:
        return {t.tokens_T[:CONTEXT].tobytes() for t in texts}

    held_out = contexts(buffer.held_out("a"))
    learned = contexts(drawn(buffer, 3000, 0.3))
    assert held_out.isdisjoint(learned)
    assert len(held_out) + len(learned) == 60
    assert 5 <= len(held_out) <= 26


def test_held_out_texts_keep_their_share_when_memory_is_short() -> None:
    buffer = ReplayBuffer(160 * SIZE, held_out_every=8)
    for i in range(3000):
        buffer.add(text(i, "ab"[i % 2]))
    for domain in "ab":
        assert 5 <= len(buffer.held_out(domain)) <= 15
        numbers = [t.temperature for t in buffer.held_out(domain)]
        assert numbers == sorted(numbers) and numbers[0] > 2000


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_mix_is_what_was_asked_for(ratio: float) -> None:
    buffer = ReplayBuffer(1 << 30, held_out_every=10**9)
    for i in range(300):
        buffer.add(text(i, "old"))
    for i in range(300, 3000):
        buffer.add(text(i, "new"))
    domains = Counter(t.domain for t in drawn(buffer, 500, ratio))
    if ratio == 1.0:
        assert domains["old"] == 0
        assert min(t.temperature for t in drawn(buffer, 200, 1.0)) >= 3000 - 256
    else:
        assert 190 <= domains["old"] <= 310


def test_draws_go_on_after_loading_as_if_nothing_had_been() -> None:
    first, second = (ReplayBuffer(50 * SIZE, seed=7) for _ in range(2))
    for i in range(300):
        first.add(text(i, "abc"[i % 3]))
    drawn(first, 37, 0.5)
    arrays, values = first.state()
    second.restore(arrays, values)
    for i in range(300, 400):
        for buffer in (first, second):
            buffer.add(text(i, "abc"[i % 3]))
        mine, other = (b.draw(0.5) for b in (first, second))
        assert mine is not None and other is not None
        assert mine.temperature == other.temperature and mine.domain == other.domain
        assert np.array_equal(mine.tokens_T, other.tokens_T)
        assert np.array_equal(mine.top_ids_TK, other.top_ids_TK)
    assert first.num_bytes == second.num_bytes and first.counts() == second.counts()


def test_labels_without_end_share_one_place() -> None:
    buffer = ReplayBuffer(1 << 30)
    for i in range(500):
        buffer.add(text(i, f"label-{i}"))
    assert len(buffer.domains) == 65 and OTHER in buffer.domains
    assert buffer.draw(0.5) is not None


def test_an_empty_buffer_has_nothing_to_draw() -> None:
    assert ReplayBuffer(1000).draw(0.5) is None
