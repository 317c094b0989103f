"""Low-rank differences are what they say, and a specialist learns its domain and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from paceline.engine.models.config import load_model_config
from paceline.trainer.checkpoint import CARD, load_draft
from paceline.trainer.judging import judge
from paceline.trainer.learner_options import LearnerOptions
from paceline.trainer.low_rank import Difference, merged, with_differences
from paceline.trainer.replay import ReplayBuffer
from paceline.trainer.samples import text_of
from paceline.trainer.sliced_adamw import NotFiniteError
from paceline.trainer.specialist import OneDomain, Order, Specialist
from tests.unit.trainer.traffic import samples_of, small_draft


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return small_draft(target, tmp_path_factory.mktemp("drafts") / "draft")


@pytest.fixture(scope="module")
def replay(target: Path) -> ReplayBuffer:
    found = ReplayBuffer(64 << 20, held_out_every=4)
    vocab = load_model_config(target).vocab_size
    for domain, seed in (("a", 0), ("b", 9)):
        for sample in samples_of(target, 128, domain=domain, seed=seed):
            found.add(text_of(sample, vocab))
    return found


def specialist(
    draft: Path, replay: ReplayBuffer, out: Path, steps: int = 60, rank: int = 8
) -> Specialist:
    options = LearnerOptions(
        str(draft), learning_rate=2e-2, batch_tokens=128, micro_tokens=128, held_out_every=4
    )
    return Specialist(Order(draft, "a", rank, steps, out), replay, options)


def finish(made: Specialist) -> None:
    for _ in range(10_000):
        if made.is_done:
            return
        assert made.micro_step(time.monotonic() + 60)
    raise AssertionError("it does not end")


def test_sums_are_what_is_computed_with(draft: Path) -> None:
    model, plain = load_draft(draft), load_draft(draft)
    tokens = torch.arange(12)[None]
    positions, visible = torch.arange(12)[None], torch.ones(1, 12, 12, dtype=torch.bool).tril()

    def logits(one: object) -> torch.Tensor:
        return one.logits(one(tokens, positions, visible))  # type: ignore[operator, attr-defined]

    differences = with_differences(model, 3, seed=1)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning and all(n.endswith(("down_RI", "up_OR")) for n in learning)
    assert len(differences) == sum(p.dim() == 2 for p in plain.parameters())
    before = {n: p.clone() for n, p in plain.named_parameters()}
    noise = torch.Generator().manual_seed(2)
    for each in differences:
        assert isinstance(each, Difference)
        each.up_OR.data.normal_(std=0.1, generator=noise)
    whole = merged(model)
    assert set(dict(whole.named_parameters())) == set(before)
    for name, parameter in whole.named_parameters():
        change = parameter - before[name]
        if parameter.dim() < 2:
            assert not change.any()
        else:
            assert torch.linalg.matrix_rank(change.double(), rtol=1e-5) == 3, name
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(whole), logits(plain))


def test_it_drafts_its_domain_better_and_says_where_it_comes_from(
    draft: Path, replay: ReplayBuffer, tmp_path: Path
) -> None:
    made = specialist(draft, replay, tmp_path / "made")
    assert not made.micro_step(time.monotonic() - 1), "there is no time"
    finish(made)
    assert not made.micro_step(time.monotonic() + 60)
    assert made.num_steps == 60 and made.num_tokens >= 60 * 128
    assert made.num_samples == replay.num_texts("a")
    made.export()
    card = json.loads((tmp_path / "made" / CARD).read_text())["specialist"]
    assert card == {"base": draft.name, "domain": "a", "rank": 8, "num_steps": 60}
    models = (load_draft(tmp_path / "made"), load_draft(draft))
    judged = [[judge(model, text) for model in models] for text in replay.held_out("a")]
    num_positions = sum(mine.num_positions for mine, _ in judged)
    gain = sum(mine.overlap - base.overlap for mine, base in judged) / num_positions
    assert gain > 0.1


def test_little_to_learn_from_is_passed_over_a_few_times_only(
    draft: Path, target: Path, tmp_path: Path
) -> None:
    few = ReplayBuffer(64 << 20, held_out_every=4)
    for sample in samples_of(target, 32, domain="a"):
        few.add(text_of(sample, load_model_config(target).vocab_size))
    made = specialist(draft, few, tmp_path / "made")
    finish(made)
    num_tokens = 32 * few.num_texts("a")
    assert made.num_steps == round(4 * num_tokens / 128) < 60
    assert made.num_tokens == made.num_steps * 128
    # With nothing at all it waits for something to come.
    assert not specialist(draft, ReplayBuffer(1 << 20), tmp_path / "made").is_done


def test_the_same_order_gives_the_same_draft(
    draft: Path, replay: ReplayBuffer, tmp_path: Path
) -> None:
    found = []
    for name in ("first", "second"):
        made = specialist(draft, replay, tmp_path / name, steps=3)
        finish(made)
        made.export()
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_it_meets_texts_of_its_domain_only(replay: ReplayBuffer) -> None:
    texts = OneDomain(replay, "b", seed=0)
    drawn = [texts.draw(0.5) for _ in range(4000)]
    assert {text.domain for text in drawn if text is not None} == {"b"}
    assert len({id(text) for text in drawn}) == replay.num_texts("b")
    held_out = {id(text) for text in replay.held_out("b")}
    assert held_out and not held_out & {id(text) for text in drawn}
    assert OneDomain(replay, "none", seed=0).draw(0.5) is None


def test_what_goes_wrong_ends_it(draft: Path, replay: ReplayBuffer, tmp_path: Path) -> None:
    made = specialist(draft, replay, tmp_path / "made")
    made._model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NotFiniteError):
        made.micro_step(time.monotonic() + 60)
    for rank, steps in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="expected at least 1"):
            specialist(draft, replay, tmp_path / "made", steps, rank)
