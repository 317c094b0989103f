"""Drafts are what followed the same tokens in the same tenant's texts; memory is bounded."""

from __future__ import annotations

import random
import statistics
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.spec.drafters.suffixes import TEXT_TOKENS
from paceline.engine.spec.drafters.trie import TrieDrafter
from tests.unit.engine.spec.retrieval_cases import assert_well_formed, budget, context, emit, paths

SMALL = {"tokens": 8 * TEXT_TOKENS, "tenant_tokens": 2 * TEXT_TOKENS, "sequence_tokens": 512}
TOKENS = st.lists(st.integers(0, 4), min_size=1, max_size=40)


def contains(text: list[int], part: tuple[int, ...]) -> bool:
    return any(tuple(text[i : i + len(part)]) == part for i in range(len(text)))


def finish(
    drafter: TrieDrafter, number: int, prompt: list[int], output: list[int], tenant: bytes = b"a"
) -> None:
    """Run a sequence that is never drafted for."""
    seen = context(number, list(prompt), len(prompt), tenant)
    for token in output:
        drafter.observe([emit(seen, [token])])
    drafter.forget(number)


@settings(deadline=None)
@given(
    outputs=st.lists(TOKENS, max_size=4),
    prompt=TOKENS,
    output=st.lists(st.integers(0, 4), max_size=40),
    nodes=st.integers(1, 20),
    depth=st.integers(1, 8),
    threshold=st.floats(0.0, 0.5),
)
def test_what_is_drafted_followed_these_tokens_before(
    outputs: list[list[int]],
    prompt: list[int],
    output: list[int],
    nodes: int,
    depth: int,
    threshold: float,
) -> None:
    drafter = TrieDrafter(**SMALL)
    for number, text in enumerate(outputs):
        # The prompts have tokens of their own, which must never come out.
        finish(drafter, number, [99] * 10, text)
    seen = context(100, list(prompt), len(prompt))
    limits = budget(nodes, depth, threshold)
    for at in range(0, len(output) + 1, 5):
        (tree,) = drafter.propose([seen], [limits])
        assert_well_formed(tree, limits)
        texts = [list(seen.token_ids), *outputs]
        for path in paths(tree):
            assert any(contains(text, (seen.token_ids[-1], *path)) for text in texts)
        drafter.observe([emit(seen, output[at : at + 5])])


def test_a_repeated_text_is_drafted_to_full_depth_and_above_rarer_ones() -> None:
    drafter = TrieDrafter()
    text = list(range(100, 160))
    finish(drafter, 1, [1], text)
    finish(drafter, 2, [1], [109, 7, 7])
    # Eight equal tokens in front count for more than one.
    (tree,) = drafter.propose([context(3, [1, *text[:10]], 1)], [budget(nodes=9)])
    assert tree.tokens[:8] == tuple(text[10:18])
    assert (7,) in paths(tree)
    assert tree.confidences[0] > 0.5 > tree.confidences[paths(tree).index((7,))]


def test_a_sequence_finds_its_own_prompt_and_others_do_not() -> None:
    drafter = TrieDrafter()
    prompt = list(range(100, 140))
    (tree,) = drafter.propose([context(1, [*prompt, 100, 101], 40)], [budget()])
    assert tree.tokens == tuple(prompt[2:10])
    (tree,) = drafter.propose([context(2, [100, 101], 2)], [budget()])
    assert len(tree) == 0
    drafter.forget(1)
    (tree,) = drafter.propose([context(3, [100, 101], 2)], [budget()])
    assert len(tree) == 0


def test_outputs_of_live_sequences_are_shared_before_they_end() -> None:
    drafter = TrieDrafter()
    first = context(1, [1], 1)
    drafter.observe([emit(first, list(range(100, 140)))])
    (tree,) = drafter.propose([context(2, [1, 110, 111], 1)], [budget()])
    assert tree.tokens == tuple(range(112, 120))


def test_a_sequences_own_output_counts_once() -> None:
    drafter, whole = TrieDrafter(), TrieDrafter()
    output = [*range(100, 140), 105, 106]
    seen = context(1, [1], 1)
    # The output joins those of the tenant, and is in the sequence's own text too.
    drafter.observe([emit(seen, output)])
    assert drafter.num_tokens == len(output)
    prompt = context(2, [1, *output], len(output) + 1)
    assert drafter.propose([seen], [budget()]) == whole.propose([prompt], [budget()])


def test_a_number_used_again_is_another_text() -> None:
    drafter = TrieDrafter()
    finish(drafter, 1, [0], [1, 2, 3])
    finish(drafter, 1, [0], [4, 5, 6])
    three, five = drafter.propose([context(n, [n], 1) for n in (3, 5)], [budget()] * 2)
    assert three.tokens == () and five.tokens == (6,)


def test_forgetting_leaves_only_the_output() -> None:
    drafter = TrieDrafter()
    seen = context(1, list(range(300)), 300)
    drafter.propose([seen], [budget()])
    assert drafter.num_tokens == 300 and drafter.num_sequences == 1
    drafter.observe([emit(seen, [1, 2, 3])])
    drafter.propose([seen], [budget()])
    assert drafter.num_tokens == 303
    drafter.forget(1)
    drafter.forget(1)
    assert drafter.num_tokens == 3 and drafter.num_sequences == 0
    assert drafter.tenant_tokens(b"a") == 3


@settings(deadline=None)
@given(
    ops=st.lists(
        st.tuples(
            st.integers(0, 5), st.sampled_from(["draft", "emit", "end"]), st.integers(1, 400)
        ),
        max_size=40,
    )
)
def test_tenants_see_only_their_own_tokens_through_all_evictions(
    ops: list[tuple[int, str, int]],
) -> None:
    drafter = TrieDrafter(**{**SMALL, "tokens": 3 * TEXT_TOKENS}, tenants=2)
    rng = random.Random(len(ops))
    live = {}
    for step, (number, op, size) in enumerate(ops):
        tenant = number // 2
        tokens = [10 * tenant + rng.randrange(4) for _ in range(size)]
        if number not in live:
            live[number] = context(step, tokens, len(tokens), b"%d" % tenant)
        seen = live[number]
        if op == "draft":
            (tree,) = drafter.propose([seen], [budget()])
            assert {token // 10 for token in tree.tokens} <= {tenant}
        elif op == "emit":
            drafter.observe([emit(seen, tokens)])
        else:
            drafter.forget(seen.sequence_id)
            del live[number]
        shares = [drafter.tenant_tokens(b"%d" % t) for t in range(3)]
        assert sum(shares) == drafter.num_tokens <= 3 * TEXT_TOKENS
        assert max(shares) <= 2 * TEXT_TOKENS
        assert sum(share > 0 for share in shares) <= 2


def test_a_tenants_drafts_do_not_depend_on_what_others_say() -> None:
    rng = random.Random(1)
    alone, crowded = TrieDrafter(), TrieDrafter()
    for number in range(30):
        prompt, output = ([rng.randrange(6) for _ in range(n)] for n in (20, 60))
        finish(alone, 2 * number, prompt, output)
        finish(crowded, 2 * number, prompt, output)
        finish(crowded, 2 * number + 1, output, prompt, tenant=b"b")
        ask = context(1000 + number, output[:10], 5)
        assert alone.propose([ask], [budget()]) == crowded.propose([ask], [budget()])


def test_memory_stays_bounded_over_many_requests_of_many_tenants() -> None:
    drafter = TrieDrafter(**SMALL, tenants=50)
    rng = random.Random(0)
    text = [rng.randrange(50) for _ in range(1000)]
    limits = [budget(nodes=4, depth=4)]
    most = 0
    for number in range(100_000):
        at = rng.randrange(980)
        seen = context(number, text[at : at + 6], 6, b"%d" % int(rng.random() ** 2 * 97))
        if number % 10 == 0:
            drafter.propose([seen], limits)
        drafter.observe([emit(seen, text[at + 6 : at + 12])])
        drafter.forget(number)
        most = max(most, drafter.num_tokens)
    assert SMALL["tokens"] // 2 < most <= SMALL["tokens"]
    assert drafter.num_sequences == 0
    shares = [drafter.tenant_tokens(b"%d" % tenant) for tenant in range(97)]
    assert sum(shares) == drafter.num_tokens
    assert sum(share > 0 for share in shares) <= 50


def test_a_long_prompt_is_indexed_at_its_end_only() -> None:
    drafter = TrieDrafter(**SMALL)
    tokens = list(range(5000))
    asked = [*tokens, 4900, 4901]
    (tree,) = drafter.propose([context(1, asked, len(asked))], [budget()])
    assert tree.tokens == tuple(range(4902, 4910))
    assert drafter.num_tokens <= 512
    asked = [*tokens, 100, 101]
    (tree,) = drafter.propose([context(2, asked, len(asked))], [budget()])
    assert len(tree) == 0


def test_shares_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="half"):
        TrieDrafter(tokens=4096, tenant_tokens=4096, sequence_tokens=4096)


def test_times_are_told() -> None:
    """Not judged: the machine may be busy. Seen with `pytest -s`."""
    drafter = TrieDrafter()
    rng = random.Random(0)
    words = [[rng.randrange(32_000) for _ in range(6)] for _ in range(200)]
    text = [token for _ in range(4000) for token in rng.choice(words)]
    for number in range(20):
        finish(drafter, number, [0], text[1000 * number : 1000 * number + 1000])
    seen = context(99, text[-500:], 500)
    start = time.perf_counter()
    drafter.propose([seen], [budget()])
    print(f"\ntrie: first draft, prompt of 500: {(time.perf_counter() - start) * 1e6:.0f} us")
    drafts, observed, sizes = [], [], []
    for token in text[:2000]:
        start = time.perf_counter()
        (tree,) = drafter.propose([seen], [budget()])
        drafts.append(time.perf_counter() - start)
        sizes.append(len(tree))
        start = time.perf_counter()
        drafter.observe([emit(seen, [token])])
        observed.append(time.perf_counter() - start)
    print(
        f"trie: draft {statistics.median(drafts) * 1e6:.0f} us of {statistics.median(sizes)} nodes"
        f", observe {statistics.median(observed) * 1e6:.1f} us"
        f" (mean {statistics.mean(observed) * 1e6:.1f})"
    )
    assert statistics.median(sizes) > 0
