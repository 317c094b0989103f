"""Outcomes count what a version's own tokens brought where they were put to the test."""

from __future__ import annotations

from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.learnings import SequenceOutcome
from paceline.domain.request import GenerationSpec
from paceline.engine.spec.outcomes import MAX_OUTCOMES, OutcomeBook
from paceline.engine.spec.tree import ROOT, DraftTree

SPEC = GenerationSpec("r", (1,), cache_salt=b"salt", domain="code")
TENANT = blake3(b"salt").digest()[:8]


def tree_of(parents: list[int], sources: list[str], also: dict[int, tuple[str, ...]]) -> DraftTree:
    size = len(parents)
    ones = (1.0,) * size
    return DraftTree(tuple(range(size)), tuple(parents), ones, ones, tuple(sources), also=also)


def test_a_round_is_counted_by_hand() -> None:
    #   root -> 0 (trie, also the model) -> 1 (trie) -> 2 (model)
    #        -> 3 (model)
    tree = tree_of([ROOT, 0, 1, ROOT], ["trie", "trie", "model", "model"], {0: ("model",)})
    book = OutcomeBook()
    book.add(7, SPEC, tree, (0, 1, 2), 4, {"model": "v1"})
    book.add(7, SPEC, tree, (0, 1), 3, {"model": "v1"})
    book.add(7, SPEC, tree, (), 1, {"model": "v2"})
    book.add(7, SPEC, tree_of([ROOT], ["trie"], {}), (0,), 2, {"model": "v2"})
    assert book.take() == []
    book.end(7)
    book.end(7)
    first = SequenceOutcome("model", "v1", TENANT, "code", 2, 2 + 2, 2 + 1, 4 + 3)
    assert book.take() == [first, SequenceOutcome("model", "v2", TENANT, "code", 1, 1, 0, 1)]
    assert book.take() == []


@st.composite
def rounds(draw: st.DrawFn) -> tuple[DraftTree, tuple[int, ...], int]:
    parents: list[int] = []
    for node in range(draw(st.integers(1, 7))):
        parents.append(draw(st.integers(ROOT, node - 1)))
    names = st.sampled_from(["trie", "a", "b"])
    sources = [draw(names) for _ in parents]
    also = {
        node: tuple(n for n in draw(st.sets(names)) if n != source)
        for node, source in enumerate(sources)
        if draw(st.booleans())
    }
    tree = tree_of(parents, sources, also)
    path = tree.path_to(draw(st.integers(ROOT, len(parents) - 1)))
    return tree, tuple(path), draw(st.integers(1, len(path) + 1))


@given(st.lists(rounds(), max_size=5))
def test_counts_are_those_of_looking_at_every_position(
    history: list[tuple[DraftTree, tuple[int, ...], int]],
) -> None:
    book = OutcomeBook()
    for tree, path, emitted in history:
        book.add(1, SPEC, tree, path, emitted, {"a": "v1", "b": "v2"})
    book.end(1)
    got = {outcome.drafter: outcome for outcome in book.take()}
    for name in ("a", "b"):
        tried = accepted = num_rounds = num_emitted = 0
        for tree, path, emitted in history:
            mine = [n for n in range(len(tree)) if name in tree.proposers(n)]
            num_rounds += bool(mine)
            num_emitted += emitted * bool(mine)
            at = ROOT
            for position in range(emitted):
                tried += any(tree.parents[n] == at for n in mine)
                if position == len(path):
                    break
                at = path[position]
                accepted += at in mine
        if not num_rounds:
            assert name not in got
            continue
        outcome = got[name]
        assert (outcome.num_tried, outcome.num_accepted) == (tried, accepted)
        assert (outcome.num_rounds, outcome.num_emitted) == (num_rounds, num_emitted)
        assert outcome.num_accepted <= outcome.num_tried


def test_outcomes_that_nobody_takes_are_bounded() -> None:
    book, tree = OutcomeBook(), tree_of([ROOT], ["model"], {})
    for i in range(MAX_OUTCOMES + 10):
        book.add(i, SPEC, tree, (0,), 2, {"model": str(i)})
        book.end(i)
    outcomes = book.take()
    assert len(outcomes) == MAX_OUTCOMES
    assert outcomes[-1].draft_version == str(MAX_OUTCOMES + 9)
