"""A draft model's trees: what they say, what they cost of its pool, whom it refuses."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.request import SamplingParams
from paceline.engine import kernels
from paceline.engine.models.config import UnsupportedModelError
from paceline.engine.sampling.noise import draft_lane
from paceline.engine.sampling.sampler import sample
from paceline.engine.spec.builders import BUILDERS, branching
from paceline.engine.spec.candidates import candidates
from paceline.engine.spec.drafters import levels
from paceline.engine.spec.drafters.draft_kv import DraftKv
from paceline.engine.spec.drafters.draft_pages import DraftPages
from paceline.engine.spec.drafters.model import (
    DraftModel,
    DraftModelOptions,
    ModelDrafter,
    load_draft_model,
)
from paceline.engine.spec.drafters.versions import make
from paceline.engine.spec.growth import TreeBuilder
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree
from paceline.engine.step import SampleSpec
from tests.checkpoints import random_checkpoint
from tests.unit.engine.spec.drafting import (
    Asked,
    Heard,
    budget,
    context,
    generated,
    path_to,
    prompt,
    transformers_logits,
)

TOLERANCE = 2e-4
"""For logits of 12, as in test_logits.py."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("drafts")
    names = ("llama", "qwen3", "mistral", "qwen2-partly-windowed")
    return {
        **{name: random_checkpoint(name, root / name) for name in names},
        # Likely tokens are few: candidates are the best 64.
        "sharp": random_checkpoint("qwen3", root / "sharp", initializer_range=1.0),
    }


@cache
def draft_model(directory: Path) -> DraftModel:
    return load_draft_model(directory, directory, DraftModelOptions(weight_format="f32"))


def drafter(
    directory: Path, builder: TreeBuilder | None = None, kv_memory_mb: int = 64, **options: int
) -> ModelDrafter:
    draft = draft_model(directory)
    kv = DraftKv(draft.kv_shape, kv_memory_mb << 20)
    return ModelDrafter(draft, kv, builder=builder or branching(1), **options)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "qwen2-partly-windowed"])
def test_a_model_drafts_for_itself_what_transformers_generates(
    checkpoints: dict[str, Path], name: str
) -> None:
    directory = checkpoints[name]
    drafts, text = drafter(directory), prompt(45)
    expected = generated(directory, text, 25)
    at = 0
    # The target takes all, one more, none, ... of what is drafted: 6 levels over page borders.
    for accepted in (6, 0, 3, 6, 1):
        tree = drafts.propose([context(1, text + expected[:at])], [budget(6, 6)])[0]
        assert list(tree.tokens) == expected[at : at + 6]
        assert tree.is_chain
        at += accepted + 1


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_every_node_of_a_tree_is_computed_as_its_path_would_be(
    checkpoints: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoints[name]
    builder, heard = Asked(3), Heard(monkeypatch)
    drafts = drafter(directory, builder)
    texts = [prompt(30), prompt(1), prompt(15)]
    budgets = [budget(21, 4), budget(2, 1), budget(12, 3)]
    trees = drafts.propose([context(i, text) for i, text in enumerate(texts)], budgets)
    assert [len(tree) for tree in trees] == [21, 2, 12]
    # Questions come level by level; within a level sequence by sequence, the shortest run first.
    order = sorted(range(3), key=lambda i: len(texts[i]))
    questions = [
        (i, path)
        for depth in range(4)
        for i, paths in zip(order, builder.paths, strict=True)
        for path in paths
        if len(path) == depth
    ]
    assert len(questions) == len(heard.logits) > 15
    for (i, path), spec, logits_V in zip(questions, heard.specs, heard.logits, strict=True):
        expected_V = transformers_logits(directory, [*texts[i], *path])[-1]
        torch.testing.assert_close(logits_V.double(), expected_V, atol=TOLERANCE, rtol=0)
        assert spec.position == len(texts[i]) + len(path)


@pytest.mark.parametrize("shape", BUILDERS)
@pytest.mark.parametrize("is_coupled", [True, False])
def test_trees_are_those_of_passes_over_every_path_from_scratch(
    checkpoints: dict[str, Path], shape: str, is_coupled: bool
) -> None:
    directory, given_ = checkpoints["llama"], budget(10, 4)
    sampling = SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=1.2, seed=5)
    contexts = [context(i, prompt(14 + i), sampling, 6, is_coupled) for i in range(2)]
    trees = drafter(directory, BUILDERS[shape]()).propose(contexts, [given_] * 2)
    for seen, tree in zip(contexts, trees, strict=True):
        growth = BUILDERS[shape]().start(given_, "model")
        while frontier := growth.frontier():
            found = []
            for node in frontier:
                path = path_to(growth, node)
                tokens = (*seen.token_ids, *path)
                logits_1V = transformers_logits(directory, tokens)[-1:].float()
                spec = SampleSpec(sampling, 0, len(tokens), 0, tokens[:6], tokens[6:])
                lane = None if is_coupled else draft_lane(node, len(path))
                found += candidates(logits_1V, [spec], [lane], levels.MOST_CHILDREN)
            growth.expand(found)
        expected = growth.tree()
        assert (tree.tokens, tree.parents) == (expected.tokens, expected.parents)
        assert len(tree) > 1
        assert tree.confidences == pytest.approx(expected.confidences, abs=1e-3)
        assert {n: p.num_drawn for n, p in tree.proposals.items()} == {
            n: p.num_drawn for n, p in expected.proposals.items()
        }
        assert bool(tree.proposals) is not is_coupled


def test_a_long_prompt_is_caught_up_with_in_parts_while_others_draft(
    checkpoints: dict[str, Path],
) -> None:
    directory = checkpoints["llama"]
    long, short = context(1, prompt(200)), context(2, prompt(10))
    whole = drafter(directory)
    expected = whole.propose([long, short], [budget(4, 4)] * 2)
    drafts = drafter(directory, catch_up_tokens=64)
    pending, trees = [], []
    while not trees or not len(trees[-1][0]):
        pending.append(drafts.pending_tokens(long))
        trees.append(drafts.propose([long, short], [budget(4, 4)] * 2))
    # 64 - 10 go to the long prompt first, then 64 - 1 a call.
    assert pending == [200, 146, 83, 20]
    assert [t[0].tokens for t in trees] == [(), (), (), expected[0].tokens]
    assert [t[1].tokens for t in trees] == [expected[1].tokens] * 4
    assert drafts.pending_tokens(long) == 1


def test_penalties_and_noise_of_a_path_are_the_targets(checkpoints: dict[str, Path]) -> None:
    """Where draft and target are one model, what it draws with the same noise is drafted."""
    directory = checkpoints["sharp"]
    sampling = SamplingParams(
        temperature=1.0,
        top_p=0.9,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        seed=77,
    )
    text, num_prompt = prompt(20), 12
    tree = drafter(directory).propose([context(1, text, sampling, num_prompt)], [budget(8, 8)])[0]
    drawn = list(text)
    for _ in range(8):
        logits_1V = transformers_logits(directory, drawn)[-1:].float()
        spec = SampleSpec(
            sampling,
            stream=0,
            position=len(drawn),
            num_logprobs=0,
            prompt_token_ids=tuple(drawn[:num_prompt]),
            output_token_ids=tuple(drawn[num_prompt:]),
        )
        token = sample(logits_1V, [spec])[0]
        assert token is not None
        drawn.append(token.token_id)
    assert list(tree.tokens) == drawn[20:]
    greedy = drafter(directory).propose([context(1, text)], [budget(8, 8)])[0]
    assert tree.tokens != greedy.tokens


def page_bytes(directory: Path) -> int:
    raw = json.loads((directory / "config.json").read_text("utf-8"))
    size = raw["hidden_size"] // raw["num_attention_heads"]
    return int(raw["num_hidden_layers"] * 2 * raw["num_key_value_heads"] * 16 * size * 4)


@pytest.mark.skipif(not kernels.has_cpp_kernels(), reason="torch's numbers move with the batch")
def test_what_is_evicted_is_computed_again_to_the_same_drafts(
    checkpoints: dict[str, Path],
) -> None:
    directory = checkpoints["llama"]
    # 85 pages of 12 KiB: two sequences of 600 tokens with their nodes fit, three do not.
    drafts = drafter(directory, kv_memory_mb=1, catch_up_tokens=1024)
    assert drafts.pages.num_pages == (1 << 20) // page_bytes(directory) == 85
    contexts = [context(i, prompt(600, seed=i)) for i in range(3)]
    alone = [
        drafter(directory, catch_up_tokens=1024).propose([c], [budget(5, 5)])[0] for c in contexts
    ]
    for i, num_free, num_evictions in (
        (0, 46, 0),
        (1, 7, 0),
        (2, 7, 1),
        (0, 7, 2),
        (0, 7, 2),
        (2, 7, 2),
    ):
        assert drafts.propose([contexts[i]], [budget(5, 5)]) == [alone[i]]
        assert (drafts.pages.num_free, drafts.pages.num_evictions) == (num_free, num_evictions)
    assert [drafts.pending_tokens(c) for c in contexts] == [1, 600, 1]
    # Together, those who have least to compute keep their pages.
    assert drafts.propose(contexts, [budget(5, 5)] * 3) == [alone[0], EMPTY_TREE, alone[2]]
    for c in contexts:
        drafts.forget(c.sequence_id)
    drafts.forget(99)
    assert drafts.pages.num_free == 85


@pytest.mark.skipif(not kernels.has_cpp_kernels(), reason="torch's numbers move with the batch")
def test_who_loses_pages_within_a_call_starts_from_nothing(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["llama"]
    drafts = drafter(directory, kv_memory_mb=1, catch_up_tokens=2048)
    lengths, grown = (540, 380, 381), (545, 390, 392)
    texts = [prompt(600, seed=i) for i in range(3)]
    # 35, 25 and 25 of 85 pages.
    first = [context(i, texts[i][:n]) for i, n in enumerate(lengths)]
    assert all(len(tree) == 8 for tree in drafts.propose(first, [budget(8, 8)] * 3))
    assert drafts.pages.num_free == 0
    # The first one takes a page and so all of the second one's, which takes the third one's.
    second = [context(i, texts[i][:n]) for i, n in enumerate(grown)]
    assert [drafts.pending_tokens(c) for c in second] == [5, 10, 11]
    trees = drafts.propose(second, [budget(8, 8)] * 3)
    assert drafts.pages.num_evictions == 2
    for i in (0, 1):
        assert list(trees[i].tokens) == generated(directory, texts[i][: grown[i]], 8)
    assert trees[2] == EMPTY_TREE


@pytest.mark.skipif(not kernels.has_cpp_kernels(), reason="torch's numbers move with the batch")
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_drafts_do_not_depend_on_the_company_or_on_what_was_drafted_before(
    checkpoints: dict[str, Path], data: st.DataObject
) -> None:
    directory = checkpoints["mistral"]
    drafts = drafter(directory, branching(2), catch_up_tokens=100)
    texts = {i: prompt(data.draw(st.integers(1, 60)), seed=i) for i in range(3)}
    for _ in range(3):
        chosen = data.draw(st.lists(st.sampled_from(range(3)), unique=True, min_size=1))
        budgets = [
            budget(data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))) for _ in chosen
        ]
        contexts = [context(i, texts[i]) for i in chosen]
        pending = sum(drafts.pending_tokens(c) for c in contexts)
        for c, b, tree in zip(contexts, budgets, drafts.propose(contexts, budgets), strict=True):
            if pending <= 100:
                assert tree == fresh_tree(directory, c.token_ids, b.nodes, b.depth)
            else:
                assert tree in (EMPTY_TREE, fresh_tree(directory, c.token_ids, b.nodes, b.depth))
        for i in chosen:
            texts[i] = texts[i] + prompt(data.draw(st.integers(1, 5)), seed=len(texts[i]))
        if data.draw(st.booleans()):
            drafts.forget(data.draw(st.sampled_from(range(3))))


def fresh_tree(directory: Path, tokens: object, nodes: int, depth: int) -> DraftTree:
    drafts = drafter(directory, branching(2))
    return drafts.propose([context(9, list(tokens))], [budget(nodes, depth)])[0]  # type: ignore[call-overload]


@pytest.mark.skipif(not kernels.has_cpp_kernels(), reason="torch has threads of its own")
def test_loading_a_draft_leaves_the_targets_threads_alone(checkpoints: dict[str, Path]) -> None:
    before = kernels.threads()
    kernels.set_threads(2)
    load_draft_model(checkpoints["llama"], checkpoints["llama"])
    assert kernels.threads() == 2
    kernels.set_threads(before)


def test_sequences_beyond_the_drafts_context_get_no_tree(checkpoints: dict[str, Path]) -> None:
    drafts = drafter(checkpoints["llama"], catch_up_tokens=2048)
    at_end = context(1, prompt(1020))
    assert len(drafts.propose([at_end], [budget(5, 5)])[0]) == 5
    assert drafts.propose([at_end], [budget(6, 6)]) == [EMPTY_TREE]
    assert drafts.propose([context(2, prompt(1030))], [budget(1, 1)]) == [EMPTY_TREE]


def test_other_vocabularies_are_refused_by_name(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    target = checkpoints["llama"]
    smaller = random_checkpoint("llama", tmp_path / "smaller", vocab_size=512)
    with pytest.raises(UnsupportedModelError, match="vocab_size: 512, the target has 4096"):
        load_draft_model(smaller, target)
    without = shutil.copytree(target, tmp_path / "without")
    (without / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json is missing"):
        load_draft_model(without, target)
    changed = shutil.copytree(target, tmp_path / "changed")
    raw = json.loads((changed / "tokenizer.json").read_text("utf-8"))
    vocab = raw["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.__getitem__)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (changed / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=r"has id 301, for the target 300; 2 tokens"):
        load_draft_model(changed, target)
    (changed / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json"):
        load_draft_model(changed, target)
    with pytest.raises(ValueError, match="weight_format"):
        load_draft_model(target, target, DraftModelOptions(weight_format="int4"))


def test_a_pool_of_less_than_a_page_is_refused(tmp_path: Path) -> None:
    wide = random_checkpoint(
        "llama", tmp_path / "wide", num_hidden_layers=17, head_dim=512, hidden_size=64
    )
    with pytest.raises(ValueError, match="not one page"):
        make(
            directory=wide,
            target=wide,
            builder=branching(1),
            options=DraftModelOptions(kv_memory_mb=1),
        )


def test_bf16_drafts_nearly_what_f32_does(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, text, heard = checkpoints["llama"], prompt(40), Heard(monkeypatch)
    drafts = make(directory=directory, target=directory, builder=branching(1))
    drafts.propose([context(1, text)], [budget(1, 1)])
    expected_V = transformers_logits(directory, text)[-1]
    error = (heard.logits[0].double() - expected_V).norm() / expected_V.norm()
    assert 1e-4 < error < 0.05


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pages_have_one_owner_and_none_are_lost(data: st.DataObject) -> None:
    pages = DraftPages(num_pages=12, block_size=4)
    held: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 30))):
        who = data.draw(st.integers(0, 4))
        if data.draw(st.integers(0, 3)) == 0:
            pages.forget(who)
            held.pop(who, None)
            continue
        kept = set(data.draw(st.lists(st.integers(0, 4))))
        slots, before = data.draw(st.integers(1, 60)), dict(held)
        got = pages.reserve(who, slots, kept)
        if got is None:
            needed = -(-slots // 4) - len(held.get(who, []))
            of_others = sum(len(p) for i, p in held.items() if i in kept and i != who)
            assert needed > 12 - len(held.get(who, [])) - of_others
            assert pages.num_free == 12 - sum(map(len, before.values()))
            continue
        held[who] = list(got)
        assert len(got) >= -(-slots // 4)
        assert held[who][: len(before.get(who, []))] == before.get(who, [])
        # Who lost pages lost all of them, and what it had computed with them.
        pages.set_computed(who, slots)
        for other in list(held):
            if other != who and pages.num_computed(other) == 0:
                assert other not in kept
                del held[other]
        owned = [page for p in held.values() for page in p]
        assert len(owned) == len(set(owned)) == 12 - pages.num_free
