"""Heads learn what the target says some tokens later, by the same learner as a small model."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from paceline.domain.learnings import Sample
from paceline.engine.models.config import UnsupportedModelError
from paceline.engine.spec.builders import branching
from paceline.engine.spec.drafter import Round
from paceline.engine.spec.drafters.medusa import MedusaDrafter, make
from paceline.engine.spec.drafters.medusa_file import MedusaConfig, load_medusa, save_medusa
from paceline.engine.spec.tree import EMPTY_TREE
from paceline.engine.weights import model_digest
from paceline.trainer.checkpoint import target_head
from paceline.trainer.heads import HeadsModel, load_heads, new_heads
from paceline.trainer.learner import OnlineLearner
from paceline.trainer.learner_options import LearnerOptions
from paceline.trainer.losses import LOSSES
from paceline.trainer.positions import weighed
from paceline.trainer.samples import text_of
from paceline.trainer.state import resumed_learner, save_state
from paceline.trainer.texts import Text
from tests.unit.engine.spec.drafting import budget, context
from tests.unit.trainer.learning import equal, feed, train, weights
from tests.unit.trainer.traffic import poisoned, samples_of, small_draft

SIZE = 64
"""Hidden size of the target of these tests."""
NUM_HEADS = 3
FIRST, CYCLE, STEP = 20, 16, 5
"""The synthetic traffic has CYCLE tokens from FIRST on; each is followed by the one STEP later."""


@pytest.fixture(scope="module")
def samples(target: Path) -> list[Sample]:
    return samples_of(target, 48, domain="a", has_hidden=True)


def options(target: Path, **changes: object) -> LearnerOptions:
    usual = LearnerOptions(
        "",
        drafter="medusa",
        target=str(target),
        num_heads=NUM_HEADS,
        learning_rate=5e-3,
        batch_tokens=256,
        micro_tokens=128,
        held_out_every=4,
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def learner(target: Path, **changes: object) -> OnlineLearner:
    return OnlineLearner(options(target, **changes))


# -- what is learned --------------------------------------------------------------------------


def after(token: int, steps: int) -> int:
    return FIRST + (token - FIRST + STEP * steps) % CYCLE


def states() -> torch.Tensor:
    """The state of each token of the synthetic traffic, [CYCLE, E]."""
    return torch.randn(CYCLE, SIZE, generator=torch.Generator().manual_seed(3))


def synthetic(first: int, count: int = 24) -> Sample:
    """Tokens in the fixed order, each known for certain from the state of the one before."""
    tokens = [after(first, i) for i in range(count + 1)]
    hidden_NE = states()[torch.tensor(tokens[:-1]) - FIRST]
    ids_NK = np.array([[token, token + 100] for token in tokens[1:]], "<i4")
    return Sample(
        tenant=b"",
        domain="d",
        draft_version="",
        temperature=0.0,
        first_position=0,
        token_ids=tuple(tokens),
        num_context=1,
        top=2,
        top_ids=ids_NK.tobytes(),
        top_probs=np.tile(np.array([1.0, 0.0], "<f2"), count).tobytes(),
        tail_mass=np.zeros(count, "<f2").tobytes(),
        origins=bytes(count),
        hidden=hidden_NE.numpy().astype("<f2").tobytes(),
    )


def proposed(drafts: MedusaDrafter, token: int, hidden_E: torch.Tensor) -> list[int]:
    """What is drafted behind the successor of a token that left a state."""
    seen = context(0, [token, after(token, 1)])
    drafts.observe([Round(seen, EMPTY_TREE, (), (after(token, 1),), hidden_E=hidden_E)])
    return list(drafts.propose([seen], [budget(NUM_HEADS, NUM_HEADS)])[0].tokens)


@pytest.mark.parametrize("loss", ["lk", "cross-entropy"])
def test_a_certain_target_is_learned_and_drafted(loss: str, target: Path, tmp_path: Path) -> None:
    one = learner(target, loss=loss, held_out_every=10**9, learning_rate=1e-2, max_passes=1e9)
    feed(one, [synthetic(FIRST + i) for i in range(CYCLE)])
    train(one, 150)
    one.export(tmp_path / "heads")
    drafts = make(directory=tmp_path / "heads", target=target, builder=branching(1))
    for i, hidden_E in enumerate(states()):
        expected = [after(FIRST + i, 1 + depth) for depth in range(1, NUM_HEADS + 1)]
        assert proposed(drafts, FIRST + i, hidden_E) == expected


def test_new_heads_say_what_the_targets_own_head_says(target: Path) -> None:
    model = new_heads(target, NUM_HEADS, 2)
    hidden_NE = torch.randn(5, SIZE)
    expected_NV = hidden_NE @ target_head(target).t()
    for k in range(NUM_HEADS):
        assert torch.equal(model.logits(k, hidden_NE), expected_NV)
    assert model.num_weights == NUM_HEADS * 2 * (SIZE * SIZE + SIZE)


def stirred(model: HeadsModel) -> HeadsModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def plain_loss(
    blocks: list[list[tuple[torch.Tensor, torch.Tensor]]], head_VE: torch.Tensor, sample: Sample
) -> torch.Tensor:
    """Forward KL of every head on a sample, position by position, in double precision."""
    count, top = sample.num_captured, sample.top
    hidden_NE = torch.from_numpy(np.frombuffer(sample.hidden, "<f2").copy()).view(count, SIZE)
    ids_NK = np.frombuffer(sample.top_ids, "<i4").reshape(count, top)
    probs_NK = np.frombuffer(sample.top_probs, "<f2").reshape(count, top)
    total = torch.zeros((), dtype=torch.float64)
    for k, own in enumerate(blocks):
        for i in range(count):
            later = i + k + 1
            if later >= count:
                continue
            x_E = hidden_NE[i].double()
            for weight_EE, bias_E in own:
                y_E = weight_EE @ x_E + bias_E
                x_E = x_E + y_E / (1 + torch.exp(-y_E))
            q_V = torch.softmax(head_VE @ x_E, -1)
            named, rest = torch.zeros(()).double(), torch.ones(()).double()
            # The learner keeps logarithms in float16.
            logs = np.log(probs_NK[later].astype(np.float32)).astype(np.float16)
            known = 0.0
            for token, log in zip(ids_NK[later], logs, strict=True):
                p = float(np.exp(np.float32(log)))
                named = named + p * torch.log(q_V[int(token)])
                rest = rest - q_V[int(token)]
                known += p
            total = total + 0.8**k * (-named - max(0.0, 1 - known) * torch.log(rest))
    return total


def test_gradients_are_those_of_the_plain_formula(target: Path, samples: list[Sample]) -> None:
    model = stirred(new_heads(target, 2, 2))
    few = [samples[0], samples[1]]
    texts = [text_of(sample, model.config.vocab_size, SIZE) for sample in few]
    total = 0.0
    for guesses in model.guesses(texts):
        loss = (LOSSES["forward-kl"](guesses.logits_NV, guesses.target) * guesses.weights_N).sum()
        loss.backward()
        total += float(loss.detach())
    named = dict(model.named_parameters())
    leaves = {n: p.detach().double().requires_grad_() for n, p in named.items()}
    blocks = [
        [(leaves[f"blocks.{k}.{i}.weight"], leaves[f"blocks.{k}.{i}.bias"]) for i in range(2)]
        for k in range(2)
    ]
    head_VE = target_head(target).double()
    expected = sum(plain_loss(blocks, head_VE, sample) for sample in few)
    assert isinstance(expected, torch.Tensor)
    gradients = torch.autograd.grad(expected, list(leaves.values()))
    assert total == pytest.approx(float(expected.detach()), rel=1e-4)
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad.double(), gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m
        )


def test_a_lesson_has_every_pair_that_the_whole_text_has(
    target: Path, samples: list[Sample]
) -> None:
    """Also where only some positions count, and in a part of it the pairs of that part."""
    one = learner(target)
    model = stirred(new_heads(target, NUM_HEADS, 1))

    def pairs(text: Text) -> list[tuple[int, float, float]]:
        found = []
        for guesses in model.guesses([text]):
            best = [round(x, 3) for x in guesses.logits_NV.max(-1).values.tolist()]
            drawn = guesses.target.drawn_N.tolist()
            found += list(zip(drawn, guesses.weights_N.tolist(), best, strict=True))
        return found

    for positions in ("all", "first-rejected", "rejected-heavy"):
        text = one.text(samples[0])
        assert text is not None
        text = weighed(text, positions)
        lesson = one._learnable.lesson(text)
        assert lesson is not None and len(lesson.tokens_T) == samples[0].num_captured + 1
        assert pairs(lesson) == pairs(text)
        part = pairs(lesson.window(4, 16))
        assert part and set(part) <= set(pairs(text))
    weight = {0.8**k for k in range(NUM_HEADS)}
    assert {round(w, 6) for _, w, _ in pairs(one.text(samples[0]))} == {round(w, 6) for w in weight}
    count = samples[0].num_captured
    assert len(pairs(one.text(samples[0]))) == sum(count - 1 - k for k in range(NUM_HEADS))
    alone = np.frombuffer(samples[0].origins, np.uint8).copy()
    alone[:] = 1
    alone[0] = 2
    text = one.text(replace(samples[0], origins=alone.tobytes()))
    assert text is not None
    # The target itself says the first token behind the first state: no head's to learn.
    assert one._learnable.lesson(weighed(text, "first-rejected")) is None


# -- the learner's promises, kept for heads ---------------------------------------------------


def test_acceptance_on_held_out_samples_rises(
    target: Path, samples: list[Sample], tmp_path: Path
) -> None:
    one = learner(target)
    feed(one, samples)
    fresh = weights(one)
    fresh_heads = tmp_path / "fresh"
    one.export(fresh_heads)
    train(one, 40)
    pairs = list(one.judging(fresh_heads))
    assert len(pairs) == len(one.replay.held_out("a")) > 5
    count = samples[0].num_captured
    expected = sum(count - 1 - k for k in range(NUM_HEADS))
    assert all(c.num_positions == i.num_positions == expected for _, (c, i) in pairs)
    learned, before = (sum(pair[i].overlap for _, pair in pairs) for i in (0, 1))
    assert learned > 1.2 * before
    one.reset(fresh_heads)
    assert equal(weights(one), fresh) and one.counters.steps_since_reset == 0
    train(one, 1)


def test_a_micro_step_keeps_to_its_time(target: Path, samples: list[Sample]) -> None:
    """By the processor's time, so that a busy machine does not matter."""
    one = OnlineLearner(options(target, micro_tokens=None, micro_step_s=0.02), time.process_time)
    feed(one, samples)
    took = []
    for _ in range(120):
        begun = time.process_time()
        one.micro_step(begun + 60)
        took.append(time.process_time() - begun)
    took = sorted(took[20:])
    assert took[len(took) * 9 // 10] < 0.02
    assert one.counters.num_tokens / one.counters.num_micro_steps > 16


def test_accumulated_micro_steps_are_one_big_step(target: Path, samples: list[Sample]) -> None:
    changed = []
    for micro_tokens in (25, 500):
        one = learner(
            target, micro_tokens=micro_tokens, batch_tokens=500, recent_ratio=0.0, warm_up_steps=0
        )
        feed(one, samples)
        train(one, 1)
        changed.append(weights(one))
    for small, big in zip(*changed, strict=True):
        torch.testing.assert_close(small, big, rtol=1e-3, atol=1e-5)


def test_heads_go_on_where_their_state_was(
    target: Path, samples: list[Sample], tmp_path: Path
) -> None:
    one = learner(target, state=str(tmp_path / "state"))
    feed(one, [replace(sample, domain="") for sample in samples])
    train(one, 3)
    save_state(tmp_path / "state", *one.state())
    two = resumed_learner(one.options, {})
    assert two.counters == one.counters and two.replay.num_bytes == one.replay.num_bytes
    one._batches._ahead = None
    for each in (one, two):
        train(each, 3)
    assert equal(weights(one), weights(two)) and not equal(weights(one), weights(learner(target)))
    # The state of one kind of draft is none of another's.
    draft = small_draft(target, tmp_path / "draft")
    other = resumed_learner(LearnerOptions(str(draft), state=str(tmp_path / "state")), {})
    assert other.counters.num_steps == 0


def test_bad_weights_and_losses_bring_good_ones_back(target: Path, samples: list[Sample]) -> None:
    one = learner(target, snapshot_steps=2)
    feed(one, samples)
    train(one, 4)
    good = weights(one)
    next(one.model.parameters()).data[0, 0] = math.nan
    one.micro_step(time.monotonic() + 60)
    assert equal(good, weights(one)) and one.counters.num_restored == 1
    train(one, 2)


def test_only_sound_samples_with_states_are_learned(target: Path, samples: list[Sample]) -> None:
    one = learner(target)
    first = samples[0]
    states = np.frombuffer(first.hidden, "<f2").reshape(first.num_captured, SIZE)
    for hidden in (
        states[:-1].tobytes(),
        states[:, :-1].tobytes(),
        np.repeat(states, 2, axis=1).tobytes(),
        first.hidden[:-1],
    ):
        with pytest.raises(ValueError, match=r"hidden: \d+ bytes"):
            one.feed(replace(first, hidden=hidden))
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="hidden: not finite"):
            one.feed(poisoned(first, "hidden", 7, value))
    for _ in range(3):
        one.feed(replace(first, hidden=b""))
    counters = one.counters
    assert (counters.num_corrupt, counters.num_left_out, counters.num_samples) == (6, 3, 0)
    assert not one.micro_step(time.monotonic() + 60)
    one.feed(first)
    assert counters.num_samples == 1
    # A small model reads no states, so keeps none.
    model = text_of(first, one.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    assert model.hidden_TE is None
    text = one.text(first)
    assert text is not None and text.nbytes == model.nbytes + len(first.hidden)


# -- files ------------------------------------------------------------------------------------


def test_an_export_is_the_heads_as_they_are(
    target: Path, samples: list[Sample], tmp_path: Path
) -> None:
    one = learner(target)
    feed(one, samples)
    train(one, 3)
    one.export(tmp_path / "heads", {"note": "x"})
    loaded = load_heads(tmp_path / "heads", target)
    rounded = [w.bfloat16().float() for w in weights(one)]
    assert equal(rounded, [p.detach() for p in loaded.parameters()])
    config, heads = load_medusa(tmp_path / "heads")
    assert config.base_model_digest == model_digest(target)
    # What a file holds does not grow with the vocabulary.
    assert all(head.head_VE is None for head in heads)
    card = json.loads((tmp_path / "heads" / "paceline_draft.json").read_text("utf-8"))
    assert card["note"] == "x" and card["learned"]["num_steps"] == 3
    again = learner(target, draft=str(tmp_path / "heads"))
    assert equal(weights(again), rounded)


def test_matrices_of_their_own_are_kept_and_not_trained(
    target: Path, samples: list[Sample], tmp_path: Path
) -> None:
    vocab = len(target_head(target))
    config = MedusaConfig(2, 1, SIZE, vocab, model_digest(target))
    tensors = {
        f"{k}.0.linear.{name}": 0.01 * torch.randn(shape)
        for k in range(2)
        for name, shape in (("weight", (SIZE, SIZE)), ("bias", (SIZE,)))
    }
    tensors["1.1.weight"] = torch.randn(vocab, SIZE)
    save_medusa(tmp_path / "heads", tensors, config)
    one = learner(target, draft=str(tmp_path / "heads"))
    feed(one, samples)
    train(one, 2)
    one.export(tmp_path / "learned")
    saved = load_file(tmp_path / "learned" / "model.safetensors")
    assert set(saved) == set(tensors)
    assert torch.equal(saved["1.1.weight"], tensors["1.1.weight"])
    for name in set(tensors) - {"1.1.weight"}:
        assert saved[name].dtype == torch.float32
        assert not torch.equal(saved[name], tensors[name])
    with pytest.raises(UnsupportedModelError, match=r"num_heads=2.* expected .*num_heads=3"):
        learner(target).reset(tmp_path / "heads")
    (tmp_path / "heads" / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="model_type is not medusa"):
        learner(target, draft=str(tmp_path / "heads"))
