"""Merged trees have the best nodes of all, and drawn children stay exact."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.spec.drafters import make_drafter
from paceline.engine.spec.drafters.union import UnionDrafter, merge
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree, Proposal
from tests.unit.engine.spec.retrieval_cases import assert_well_formed, budget, context, emit, paths

Path = tuple[int, ...]


@st.composite
def trees(draw: st.DrawFn, source: str = "x", vocab: int = 4) -> DraftTree:
    """Return a tree of point masses with falling values."""
    names: list[Path] = []
    values: list[float] = []
    for _ in range(draw(st.integers(0, 8))):
        parent = draw(st.integers(-1, len(names) - 1))
        path = (*(names[parent] if parent >= 0 else ()), draw(st.integers(0, vocab - 1)))
        if path not in names:
            names.append(path)
            above = values[parent] if parent >= 0 else 1.0
            values.append(above * draw(st.floats(0.01, 1.0)))
    return DraftTree(
        tokens=tuple(path[-1] for path in names),
        parents=tuple(names.index(path[:-1]) if path[:-1] else -1 for path in names),
        confidences=tuple(draw(st.floats(0.0, 1.0)) for _ in names),
        values=tuple(values),
        sources=(source,) * len(names),
    )


def flat(tokens: list[int], values: list[float], source: str = "r") -> DraftTree:
    """Return a tree of children of the root."""
    size = len(tokens)
    return DraftTree(tuple(tokens), (-1,) * size, tuple(values), tuple(values), (source,) * size)


@settings(deadline=None)
@given(a=trees("a"), b=trees("b"), c=trees("c"), nodes=st.integers(1, 20))
def test_the_best_nodes_of_all_trees_are_kept(
    a: DraftTree, b: DraftTree, c: DraftTree, nodes: int
) -> None:
    limits = budget(nodes)
    merged = merge([a, b, c], limits)
    assert_well_formed(merged, limits)
    edges: dict[Path, float] = {}
    first: dict[Path, tuple[str, float]] = {}
    for tree in (a, b, c):
        for node, path in enumerate(paths(tree)):
            parent = tree.parents[node]
            edge = tree.values[node] / (tree.values[parent] if parent >= 0 else 1.0)
            edges[path] = max(edges.get(path, 0.0), edge)
            first.setdefault(path, (tree.sources[node], tree.confidences[node]))
    # Siblings exclude each other: the better ones leave the rest of 1 to the others. The only tree
    # there is stays as it is.
    left: dict[Path, float] = {}
    is_alone = merged in (a, b, c)
    for path in () if is_alone else sorted(edges, key=lambda path: -min(1.0, edges[path])):
        edges[path] = min(1.0, edges[path], left.get(path[:-1], 1.0))
        left[path[:-1]] = left.get(path[:-1], 1.0) - edges[path]
    values: dict[Path, float] = {(): 1.0}
    for path in sorted(edges, key=len):
        values[path] = values[path[:-1]] * min(1.0, edges[path])
    del values[()]
    for node, path in enumerate(paths(merged)):
        assert merged.values[node] == pytest.approx(values[path])
        assert (merged.sources[node], merged.confidences[node]) == first[path]
    assert sorted(merged.values) == pytest.approx(sorted(values.values())[-nodes:])
    if merged not in (a, b, c):
        for siblings in merged.children().values():
            tried = [merged.values[node] for node in siblings]
            assert tried == sorted(tried, reverse=True)


def test_a_single_proposer_is_left_alone_and_none_gives_nothing() -> None:
    tree = flat([1, 2, 3], [0.5, 0.3, 0.1])
    assert merge([EMPTY_TREE, tree], budget(nodes=3)) is tree
    assert merge([EMPTY_TREE, tree], budget(nodes=2)).tokens == (1, 2)
    assert merge([EMPTY_TREE, EMPTY_TREE], budget()) is EMPTY_TREE


def test_agreement_on_a_token_lifts_what_follows_it() -> None:
    # The first is unsure of 1, but if 1 is right then it is sure of 2; the other knows 1.
    unsure = DraftTree((1, 2), (-1, 0), (0.4, 0.9), (0.4, 0.36), ("a", "a"))
    merged = merge([unsure, flat([1, 3], [0.9, 0.05], "b")], budget())
    by_path = dict(zip(paths(merged), merged.values, strict=True))
    assert by_path == pytest.approx({(1,): 0.9, (1, 2): 0.81, (3,): 0.05})
    assert merged.sources[0] == "a"


REACHED = (0.6, 0.35, 0.2)
"""Values of the first, second and third draw, known before they are drawn."""
DRAFT = (0.4, 0.3, 0.2, 0.1)
TARGET = (0.1, 0.25, 0.3, 0.35)


def test_all_who_proposed_a_node_are_named() -> None:
    first = flat([1, 2], [0.5, 0.3], "a")
    second = flat([2, 3], [0.4, 0.2], "b")
    third = flat([2], [0.1], "c")
    merged = merge([first, second, third], budget(8, 8))
    names = {merged.tokens[n]: merged.proposers(n) for n in range(len(merged))}
    assert names == {1: ("a",), 2: ("a", "b", "c"), 3: ("b",)}
    cut = merge([first, second], budget(1, 8))
    assert all(n < len(cut) for n in cut.also)


def drawn_tree(tokens: Path) -> DraftTree:
    proposal = Proposal((0, 1, 2, 3), DRAFT, num_drawn=len(tokens))
    tree = flat(list(tokens), list(REACHED[: len(tokens)]), "model")
    return replace(tree, proposals={-1: proposal})


def emitted(tree: DraftTree) -> list[float]:
    """Return the distribution of the first token under recursive rejection, exactly."""
    left = list(TARGET)
    draft = [0.0] * 4
    proposal = tree.proposals.get(-1)
    for token, prob in zip(proposal.tokens, proposal.probs, strict=True) if proposal else ():
        draft[token] = prob
    out, reached = [0.0] * 4, 1.0
    for i, node in enumerate(tree.children().get(-1, [])):
        token = tree.tokens[node]
        if proposal is None or i >= proposal.num_drawn:
            draft = [float(t == token) for t in range(4)]
        accept = min(1.0, left[token] / draft[token])
        out[token] += reached * accept
        reached *= 1.0 - accept
        left = [max(0.0, p - q) for p, q in zip(left, draft, strict=True)]
        if reached < 1e-15 or sum(left) < 1e-15:
            return out
        left = [p / sum(left) for p in left]
        draft[token] = 0.0
        if sum(draft) > 0.0:
            draft = [q / sum(draft) for q in draft]
    return [o + reached * p for o, p in zip(out, left, strict=True)]


def mixture(num_draws: int, make: dict[Path, DraftTree]) -> list[float]:
    """Return the distribution of the emitted token over all that could have been drawn."""
    total = [0.0] * 4
    for tokens in permutations(range(4), num_draws):
        weight, rest = 1.0, 1.0
        for token in tokens:
            weight *= DRAFT[token] / rest
            rest -= DRAFT[token]
        total = [t + weight * p for t, p in zip(total, emitted(make[tokens]), strict=True)]
    return total


RETRIEVED = st.lists(
    st.tuples(st.integers(0, 3), st.floats(0.01, 1.0)), max_size=4, unique_by=lambda r: r[0]
)


@settings(deadline=None)
@given(num_draws=st.integers(1, 3), retrieved=RETRIEVED, nodes=st.integers(1, 6))
def test_merged_draws_leave_the_distribution_as_it_is(
    num_draws: int, retrieved: list[tuple[int, float]], nodes: int
) -> None:
    other = flat([t for t, _ in retrieved], [v for _, v in retrieved])
    merged = {
        tokens: merge([other, drawn_tree(tokens)], budget(nodes))
        for tokens in permutations(range(4), num_draws)
    }
    ranked = sorted([*REACHED[:num_draws], *(v for _, v in retrieved)], reverse=True)
    # Of equal values the draw goes first.
    expected = sum(v >= ranked[:nodes][-1] for v in REACHED[: min(num_draws, nodes)])
    for tokens, tree in merged.items():
        proposal = tree.proposals.get(-1)
        num_drawn = proposal.num_drawn if proposal else 0
        assert num_drawn == expected, "how many draws are kept depends on their tokens"
        assert tree.tokens[:num_drawn] == tokens[:num_drawn]
        assert tree.sources == ("model",) * num_drawn + ("r",) * (len(tree) - num_drawn)
        assert proposal is None or (proposal.tokens, proposal.probs) == ((0, 1, 2, 3), DRAFT)
        assert len(tree) <= nodes
    assert mixture(num_draws, merged) == pytest.approx(TARGET, abs=1e-9)


def test_saving_a_draw_because_another_tree_has_its_token_would_be_seen() -> None:
    def naive(tokens: Path) -> DraftTree:
        # Two places: the retrieved 3 and the first draw, or both draws if the second one is 3.
        num_drawn = 2 if tokens[1] == 3 else 1
        tree = flat([*tokens[:num_drawn], 3][: 2 if tokens[0] != 3 else 1], [0.9, 0.5])
        return replace(tree, proposals={-1: Proposal((0, 1, 2, 3), DRAFT, num_drawn)})

    draws: list[Path] = list(permutations(range(4), 2))
    biased = {tokens: naive(tokens) for tokens in draws}
    error = [abs(p - q) for p, q in zip(mixture(2, biased), TARGET, strict=True)]
    assert max(error) > 1e-3


def drawn_in_two_levels(second: int, below: DraftTree) -> DraftTree:
    """Return draws 2 and `second` at the root, and a tree behind the first, drawn first too."""
    tree = DraftTree(
        tokens=(2, second, *below.tokens),
        parents=(-1, -1, *(0 if parent == -1 else parent + 2 for parent in below.parents)),
        confidences=(0.6, 0.35, *below.confidences),
        values=(0.6, 0.35, *(0.6 * value for value in below.values)),
        sources=("model",) * (2 + len(below)),
        proposals={-1: Proposal((0, 1, 2, 3), DRAFT, 2)},
    )
    if len(below):
        tree = replace(tree, proposals={**tree.proposals, 0: Proposal((0, 1, 2, 3), DRAFT, 1)})
    return tree


@settings(deadline=None)
@given(a=trees("a"), below=trees("model"), b=trees("b"), nodes=st.integers(1, 16))
def test_which_draws_are_kept_in_two_levels_does_not_depend_on_a_draws_token(
    a: DraftTree, below: DraftTree, b: DraftTree, nodes: int
) -> None:
    kept = []
    for second in (0, 1, 3):
        tree = drawn_in_two_levels(second, below)
        merged = merge([a, tree, b], budget(nodes))
        names, children = paths(merged), merged.children()
        assert len(merged) <= nodes and len(set(names)) == len(names)
        assert all(parent < node for node, parent in enumerate(merged.parents))
        drawn = {(): [2, second], (2,): list(below.tokens[:1])}
        counts = {}
        for parent, proposal in merged.proposals.items():
            name = names[parent] if parent >= 0 else ()
            counts[name] = proposal.num_drawn
            first = [merged.tokens[node] for node in children[parent]][: proposal.num_drawn]
            assert first == drawn[name][: proposal.num_drawn] != []
        kept.append(counts)
    assert kept[0] == kept[1] == kept[2]


def test_draws_of_a_second_model_become_point_masses() -> None:
    merged = merge([drawn_tree((2,)), drawn_tree((1,))], budget())
    assert merged.tokens == (2, 1)
    assert merged.proposals[-1].num_drawn == 1


def test_a_union_drafts_what_its_parts_draft() -> None:
    union = make_drafter("trie+recycling")
    parts = [make_drafter("trie"), make_drafter("recycling")]
    assert union.name == "trie+recycling" and union.version == ""
    assert union.needs.successors == 8 and not union.needs.hidden
    prompt = [1, 2, 3, 4, 5, 1, 2]
    drafts = {}
    for name, drafters in (("union", [union]), ("parts", parts)):
        for drafter in drafters:
            seen = context(1, list(prompt), len(prompt))
            drafter.observe([emit(seen, [3], successors=[[7, 3, 8, 9, 10, 11, 12, 13]])])
        asked = context(2, [1, 2, 3, 1, 2], 5)
        drafts[name] = [drafter.propose([asked], [budget()])[0] for drafter in drafters]
        for drafter in drafters:
            drafter.forget(1)
    assert drafts["union"] == [merge(drafts["parts"], budget())]
    assert set(drafts["union"][0].sources) == {"trie", "recycling"}


def test_parts_that_hear_of_steps_already_are_not_told_twice() -> None:
    trie = make_drafter("trie")
    union = UnionDrafter([trie], is_owner=False)
    union.observe([emit(context(1, [1], 1), [2])])
    union.forget(1)
    (tree,) = union.propose([context(2, [1], 1)], [budget()])
    assert len(tree) == 0
