"""A saved draft is a checkpoint like any other: transformers and the engine read it alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from paceline.domain.errors import InvalidRequestError
from paceline.domain.request import GenerationSpec, SamplingParams
from paceline.engine.build import build_engine
from paceline.engine.events import OutputEvent
from paceline.engine.models.config import load_model_config
from paceline.engine.options import EngineOptions
from paceline.engine.weights import load_tensors
from paceline.trainer.checkpoint import (
    CARD,
    borrow_embedding,
    check_place,
    save_draft,
    target_head,
)
from paceline.trainer.decoder import DraftModel
from paceline.trainer.sizes import (
    MAX_COST_RATIO,
    check_memory,
    draft_shape,
    target_parameters,
)
from tests.checkpoints import ARCHITECTURES, DEMO, random_checkpoint


def saved(target: Path, out: Path, hidden: int = 48) -> DraftModel:
    """Save a random draft and return the model as it was saved, in bf16's numbers."""
    config = load_model_config(target)
    model = DraftModel(draft_shape(config, 2, hidden))
    for parameter in model.parameters():
        parameter.data.mul_(4).add_(torch.randn_like(parameter) * 0.02)
        parameter.data.copy_(parameter.data.bfloat16())
    save_draft(model, target, config, out, {"format": 1})
    return model


def causal(model: DraftModel, tokens: list[int]) -> torch.Tensor:
    count = len(tokens)
    visible = torch.ones(1, count, count, dtype=torch.bool).tril()
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens]), torch.arange(count)[None], visible))[0]


@pytest.mark.parametrize("hidden", [20, 48, 128])
def test_transformers_computes_the_same_logits(target: Path, tmp_path: Path, hidden: int) -> None:
    model = saved(target, tmp_path / "draft", hidden)
    other = LlamaForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.float32)
    tokens = torch.randint(0, 260, (90,)).tolist()
    with torch.no_grad():
        expected = other(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.05
    torch.testing.assert_close(causal(model, tokens), expected, atol=1e-4, rtol=1e-4)


def test_the_engine_goes_on_as_the_module_says(target: Path, tmp_path: Path) -> None:
    model = saved(target, tmp_path / "draft")
    engine, card = build_engine(EngineOptions(model=str(tmp_path / "draft"), num_kv_blocks=16))
    assert card.config.eos_token_ids == load_model_config(target).eos_token_ids
    tokens = [3, 7, 11, 200]
    spec = GenerationSpec("a", tuple(tokens), SamplingParams(0.0), max_tokens=24, ignore_eos=True)
    engine.submit(spec)
    while engine.num_requests:
        for event in engine.step():
            if isinstance(event, OutputEvent):
                for chunk in event.chunks:
                    tokens += chunk.token_ids
    assert causal(model, tokens)[3:-1].argmax(-1).tolist() == tokens[4:]


def test_tokenizer_and_template_are_the_targets(target: Path, tmp_path: Path) -> None:
    saved(target, tmp_path / "draft")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "draft" / name).read_bytes() == (target / name).read_bytes()


def test_the_embedding_keeps_what_so_few_dimensions_can(target: Path) -> None:
    head = target_head(target)
    config = load_model_config(target)
    assert torch.equal(head, dict(load_tensors(target))["lm_head.weight"].float())
    model = DraftModel(draft_shape(config, 1, 16))
    borrow_embedding(model, head)
    borrowed = model.model.embed_tokens.weight.detach()
    best = torch.linalg.svdvals(head)[:16]
    torch.testing.assert_close(torch.linalg.svdvals(borrowed), best, rtol=1e-3, atol=1e-3)


def test_a_wider_draft_borrows_all_there_is(target: Path) -> None:
    model = DraftModel(draft_shape(load_model_config(target), 1, 96))
    head = target_head(target)
    borrow_embedding(model, head)
    borrowed = model.model.embed_tokens.weight.detach()[:, :64]
    torch.testing.assert_close(borrowed @ borrowed.T, head @ head.T, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_drafts_are_sized_for_every_served_target(architecture: str, tmp_path: Path) -> None:
    directory = random_checkpoint(architecture, tmp_path)
    config = load_model_config(directory)
    weights = sum(t.numel() for n, t in load_tensors(directory) if "bias" not in n)
    assert abs(target_parameters(config) - weights) < 1000  # norms of heads
    shape = draft_shape(config, 2, None)
    assert shape.vocab_size == config.vocab_size
    assert sum(p.numel() for p in DraftModel(shape).parameters()) == shape.num_parameters


def test_a_draft_of_the_demo_costs_little() -> None:
    config = load_model_config(DEMO)
    shape = draft_shape(config, 1, None)
    assert 500_000 < shape.num_parameters <= MAX_COST_RATIO * target_parameters(config)


def test_a_draft_replaces_a_draft_and_nothing_else(target: Path, tmp_path: Path) -> None:
    out = tmp_path / "draft"
    saved(target, out)
    (out / "README.md").write_text("mine")
    with pytest.raises(InvalidRequestError, match="not empty"):
        check_place(out, overwrite=False)
    check_place(out, overwrite=True)
    before = (out / "model.safetensors").read_bytes()
    saved(target, out)
    assert (out / "model.safetensors").read_bytes() != before
    assert (out / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]
    (out / CARD).unlink()
    with pytest.raises(InvalidRequestError, match="no draft to replace"):
        check_place(out, overwrite=True)


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match="not a directory"):
        check_place(tmp_path / "file", overwrite=True)
    with pytest.raises(OSError, match="nowhere"):
        check_place(tmp_path / "nowhere" / "draft", overwrite=False)


def test_what_fails_while_saving_leaves_nothing(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "draft"
    saved(target, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(TypeError):
        save_draft(
            DraftModel(draft_shape(load_model_config(target), 1, 16)),
            target,
            load_model_config(target),
            out,
            {"cannot be written": object()},
        )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_too_little_memory_is_told_before_the_work(target: Path, tmp_path: Path) -> None:
    shape = draft_shape(load_model_config(target), 2, 64)

    def check(available_kb: int) -> None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available_kb} kB\n")
        check_memory(
            target, shape, batch_tokens=64, pool_bytes=1 << 20, meminfo=tmp_path / "meminfo"
        )

    check(1 << 20)
    with pytest.raises(InvalidRequestError, match="MiB of memory"):
        check(1 << 10)
    check_memory(target, shape, batch_tokens=64, pool_bytes=1, meminfo=tmp_path / "none")
