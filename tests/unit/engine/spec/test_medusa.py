"""Medusa heads: which token each one means, their file, and what their candidates are worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paceline.engine.models.config import UnsupportedModelError
from paceline.engine.spec.builders import branching
from paceline.engine.spec.drafter import DraftContext, Round
from paceline.engine.spec.drafters.medusa import MedusaDrafter, MedusaHeads, make
from paceline.engine.spec.drafters.medusa_file import (
    MedusaConfig,
    MedusaHead,
    load_medusa,
    save_medusa,
)
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree
from paceline.engine.weights import model_digest
from tests.checkpoints import random_checkpoint
from tests.unit.engine.spec.drafting import budget, context, transformers_model

VOCAB, NUM_HEADS = 24, 4
STEP = 5
"""The model of these tests continues every token x with x + 5."""


def shift(steps: int) -> torch.Tensor:
    """[V, E] the product with a one-hot token gives the one `steps` later."""
    return torch.eye(VOCAB).roll(STEP * steps, dims=0)


def seen_after(sequence_id: int, tokens: Sequence[int], path: int = 0) -> Round:
    """A step that drew the last token and accepted `path` in front of it; hidden is one-hot."""
    emitted = tuple(tokens[len(tokens) - path - 1 :])
    accepted = DraftTree(emitted[:-1], tuple(range(-1, path - 1)), (1.0,) * path, (1.0,) * path)
    hidden_E = torch.zeros(VOCAB)
    hidden_E[tokens[-2]] = 1.0
    done = context(sequence_id, tokens)
    return Round(done, accepted, tuple(range(path)), emitted, hidden_E=hidden_E)


def own_heads(scale: float = 50.0) -> MedusaHeads:
    """Head k+1 says of the hidden state of token t what comes k+2 tokens later."""
    config = MedusaConfig(NUM_HEADS, 0, VOCAB, VOCAB)
    heads = [MedusaHead((), scale * shift(k + 2)) for k in range(NUM_HEADS)]
    return MedusaHeads(config, heads, torch.zeros(VOCAB, VOCAB))


def tied_heads() -> MedusaHeads:
    """The same by residual blocks in front of the target's head, which says what comes next.

    SiLU of 60 is 60, SiLU of 0 is 0: the block adds 60 times the hidden state of a later token.
    """
    config = MedusaConfig(NUM_HEADS, 1, VOCAB, VOCAB)
    heads = [
        MedusaHead(((60.0 * shift(k + 1), torch.zeros(VOCAB)),), None) for k in range(NUM_HEADS)
    ]
    return MedusaHeads(config, heads, shift(1))


def drafter(heads: MedusaHeads, width: int = 1) -> MedusaDrafter:
    return MedusaDrafter(heads, version="v", builder=branching(width))


def text(first: int, length: int) -> list[int]:
    return [(first + STEP * i) % VOCAB for i in range(length)]


@pytest.mark.parametrize("make_heads", [own_heads, tied_heads])
def test_head_one_names_the_child_of_the_newest_token(make_heads: object) -> None:
    drafts = drafter(make_heads())  # type: ignore[operator]
    texts = [text(3, 9), text(7, 2)]
    drafts.observe([seen_after(i, tokens) for i, tokens in enumerate(texts)])
    contexts = [context(i, tokens) for i, tokens in enumerate(texts)]
    trees = drafts.propose(contexts, [budget(9, 9), budget(2, 2)])
    assert list(trees[0].tokens) == text(3, 13)[9:]
    assert list(trees[1].tokens) == text(7, 4)[2:]
    assert trees[0].is_chain
    # After the step that accepted two of them and drew a third, from the newest state again.
    drafts.observe([seen_after(0, text(3, 12), path=2)])
    tree = drafts.propose([context(0, text(3, 12))], [budget(4, 4)])[0]
    assert list(tree.tokens) == text(3, 16)[12:]


def test_nodes_of_a_depth_have_the_same_candidates() -> None:
    drafts = drafter(own_heads(scale=2.0), width=2)
    drafts.observe([seen_after(0, text(0, 5))])
    tree = drafts.propose([context(0, text(0, 5))], [budget(14, 3)])[0]
    depths = tree.depths
    children = tree.children()
    for node, own in children.items():
        same = [m for m in children if (m < 0) == (node < 0) and depths[m] == depths[node]]
        for other in same:
            assert [tree.tokens[i] for i in own] == [tree.tokens[i] for i in children[other]]
    assert tree.tokens[0] == text(0, 6)[5]
    assert not tree.proposals


def test_only_what_was_observed_last_is_drafted_from() -> None:
    drafts = drafter(own_heads())
    tokens = text(3, 9)
    assert drafts.propose([context(0, tokens)], [budget(2, 2)]) == [EMPTY_TREE]
    drafts.observe([seen_after(0, tokens)])
    assert drafts.propose([context(0, text(3, 10))], [budget(2, 2)]) == [EMPTY_TREE]
    assert len(drafts.propose([context(0, tokens)], [budget(2, 2)])[0]) == 2
    drafts.forget(0)
    drafts.forget(5)
    assert drafts.propose([context(0, tokens)], [budget(2, 2)]) == [EMPTY_TREE]
    drafts.observe([seen_after(0, tokens)])
    drafts.observe([Round(context(0, text(3, 10)), EMPTY_TREE, (), (text(3, 10)[-1],))])
    assert drafts.propose([context(0, text(3, 10))], [budget(2, 2)]) == [EMPTY_TREE]


def test_swapped_heads_draft_from_the_same_states() -> None:
    drafts = drafter(own_heads())
    drafts.observe([seen_after(0, text(3, 9))])
    two_on = [MedusaHead((), 50.0 * shift(k + 3)) for k in range(2)]
    config = MedusaConfig(2, 0, VOCAB, VOCAB)
    drafts.swap(MedusaHeads(config, two_on, torch.zeros(VOCAB, VOCAB)), "next")
    assert drafts.version == "next"
    tree = drafts.propose([context(0, text(3, 9))], [budget(9, 9)])[0]
    assert list(tree.tokens) == text(3, 12)[10:]


def test_confidences_follow_what_has_been_right() -> None:
    """Head 1 is always right, head 2 never, whatever probability they claim."""
    config = MedusaConfig(2, 0, VOCAB, VOCAB)
    heads = [MedusaHead((), 4.0 * shift(2)), MedusaHead((), 4.0 * shift(9))]
    drafts = drafter(MedusaHeads(config, heads, torch.zeros(VOCAB, VOCAB)))
    length = 5
    first = None
    for _ in range(60):
        drafts.observe([seen_after(0, text(0, length), path=1)])
        seen: DraftContext = context(0, text(0, length))
        tree = drafts.propose([seen], [budget(2, 2)])[0]
        first = first or tree
        length += 2
    assert first is not None
    assert first.confidences[0] == pytest.approx(first.confidences[1], abs=0.01)
    assert tree.confidences[0] > 0.95
    assert tree.confidences[1] < 0.1


def test_heads_compute_what_upstreams_modules_do() -> None:
    """medusa_model.py: nn.Sequential(ResBlock x layers, nn.Linear(hidden, vocabulary))."""
    size, vocab, layers = 16, 40, 2
    tensors = random_tensors(NUM_HEADS, layers, size, vocab, tied=(2,))
    lm_head = torch.nn.Linear(size, vocab, bias=False)
    config = MedusaConfig(NUM_HEADS, layers, size, vocab)
    heads = [
        MedusaHead(
            tuple(
                (tensors[f"{k}.{i}.linear.weight"], tensors[f"{k}.{i}.linear.bias"])
                for i in range(layers)
            ),
            tensors.get(f"{k}.{layers}.weight"),
        )
        for k in range(NUM_HEADS)
    ]
    hidden_SE = torch.randn(3, size)
    ours = MedusaHeads(config, heads, lm_head.weight.detach()).logits(hidden_SE)
    for k in range(NUM_HEADS):
        x_SE = hidden_SE
        for i in range(layers):
            block = torch.nn.Linear(size, size)
            block.load_state_dict(
                {name: tensors[f"{k}.{i}.linear.{name}"] for name in ("weight", "bias")}
            )
            x_SE = x_SE + torch.nn.functional.silu(block(x_SE))
        theirs_SV = x_SE @ tensors.get(f"{k}.{layers}.weight", lm_head.weight).t()
        error = (ours[:, k] - theirs_SV).norm() / theirs_SV.norm()
        # The last product is in bf16.
        assert error < 1e-2


def random_tensors(
    num_heads: int, layers: int, size: int, vocab: int, tied: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    tensors = {}
    for k in range(num_heads):
        for i in range(layers):
            tensors[f"{k}.{i}.linear.weight"] = torch.randn(size, size) / size**0.5
            tensors[f"{k}.{i}.linear.bias"] = torch.randn(size)
        if k not in tied:
            tensors[f"{k}.{layers}.weight"] = torch.randn(vocab, size)
    return tensors


def test_what_was_written_is_read(tmp_path: Path) -> None:
    config = MedusaConfig(3, 2, 16, 40, base_model_digest="ab")
    tensors = random_tensors(3, 2, 16, 40, tied=(1,))
    save_medusa(tmp_path / "heads", tensors, config)
    read, heads = load_medusa(tmp_path / "heads")
    assert read == config
    assert heads[1].head_VE is None
    assert torch.equal(heads[2].blocks[1][0], tensors["2.1.linear.weight"])
    assert torch.equal(heads[0].blocks[0][1], tensors["0.0.linear.bias"])
    assert heads[0].head_VE is not None
    assert torch.equal(heads[0].head_VE, tensors["0.2.weight"])
    raw = json.loads((tmp_path / "heads" / "config.json").read_text("utf-8"))
    assert raw == {
        "model_type": "medusa",
        "medusa_num_heads": 3,
        "medusa_num_layers": 2,
        "hidden_size": 16,
        "vocab_size": 40,
        "base_model_digest": "ab",
    }
    assert set(load_file(tmp_path / "heads" / "model.safetensors")) == set(tensors)


def test_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    config = MedusaConfig(2, 1, 16, 40)
    tensors = random_tensors(2, 1, 16, 40)
    for change, message in (
        ({"0.0.linear.bias": None}, r"tensor 0\.0\.linear\.bias is missing"),
        ({"1.1.weight": torch.zeros(41, 16)}, r"1\.1\.weight: \(41, 16\), expected \(40, 16\)"),
        ({"2.0.linear.bias": torch.zeros(16)}, r"unexpected tensors: 2\.0\.linear\.bias"),
        ({"0.1.weight": torch.zeros(40, 16, dtype=torch.int8)}, "int8 is not supported"),
    ):
        changed = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        with pytest.raises(UnsupportedModelError, match=message):
            save_medusa(tmp_path / "never", changed, config)
        assert not (tmp_path / "never").exists()
        save_medusa(tmp_path / "heads", tensors, config)
        save_file(changed, tmp_path / "heads" / "model.safetensors")
        with pytest.raises(UnsupportedModelError, match=message):
            load_medusa(tmp_path / "heads")
    save_medusa(tmp_path / "heads", tensors, config)
    raw = json.loads((tmp_path / "heads" / "config.json").read_text("utf-8"))
    for key, value, message in (
        ("model_type", "llama", "model_type is not medusa"),
        ("medusa_num_heads", 0, "medusa_num_heads: 0 is not a number from 1 on"),
        ("vocab_size", True, "vocab_size: True"),
        ("base_model_digest", 7, "base_model_digest: 7"),
    ):
        changed_raw = json.dumps({**raw, key: value})
        (tmp_path / "heads" / "config.json").write_text(changed_raw, encoding="utf-8")
        with pytest.raises(UnsupportedModelError, match=message):
            load_medusa(tmp_path / "heads")
    (tmp_path / "heads" / "config.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        load_medusa(tmp_path / "heads")


def test_heads_of_another_target_are_refused_and_tied_ones_take_its_head(tmp_path: Path) -> None:
    target = random_checkpoint("qwen2", tmp_path / "target")
    digest = model_digest(target)
    tensors = random_tensors(2, 1, 64, 4096, tied=(0, 1))
    save_medusa(tmp_path / "heads", tensors, MedusaConfig(2, 1, 64, 4096, digest))
    drafts = make(directory=tmp_path / "heads", target=target, builder=branching(1))
    assert drafts.version == model_digest(tmp_path / "heads")[:12]
    hidden_E = torch.randn(64)
    seen = context(0, [5, 6, 7])
    drafts.observe([Round(seen, EMPTY_TREE, (), (7,), hidden_E=hidden_E)])
    tree = drafts.propose([seen], [budget(2, 2)])[0]
    lm_head_VE = transformers_model(target).lm_head.weight.detach()
    for k, token in enumerate(tree.tokens):
        weight, bias = (tensors[f"{k}.0.linear.{name}"].double() for name in ("weight", "bias"))
        x_E = hidden_E.double()
        x_E = x_E + torch.nn.functional.silu(weight @ x_E + bias)
        logits_V = lm_head_VE @ x_E
        assert logits_V.max() - logits_V[token] < 0.02 * logits_V.max()
    save_medusa(tmp_path / "heads", tensors, MedusaConfig(2, 1, 64, 4096, "0" * 64))
    with pytest.raises(UnsupportedModelError, match="base_model_digest"):
        make(directory=tmp_path / "heads", target=target, builder=branching(1))
    smaller = random_tensors(1, 1, 32, 4096)
    save_medusa(tmp_path / "smaller", smaller, MedusaConfig(1, 1, 32, 4096))
    with pytest.raises(UnsupportedModelError, match="hidden_size: 32, the target has 64"):
        make(directory=tmp_path / "smaller", target=target, builder=branching(1))
