"""Drafts of every architecture the engine drafts with, loaded to be trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paceline.engine.models.config import UnsupportedModelError, load_model_config
from paceline.trainer.checkpoint import load_draft, save_draft
from paceline.trainer.decoder import DraftModel
from tests.checkpoints import ARCHITECTURES, VARIANTS, random_checkpoint


def causal(model: DraftModel, tokens: list[int]) -> torch.Tensor:
    count = len(tokens)
    visible = torch.ones(1, count, count, dtype=torch.bool).tril()
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens]), torch.arange(count)[None], visible))[0]


@pytest.mark.parametrize("name", [*ARCHITECTURES, *VARIANTS])
def test_logits_are_those_of_transformers_also_after_saving(name: str, tmp_path: Path) -> None:
    source = random_checkpoint(name, tmp_path / "source")
    model = load_draft(source)
    tokens = torch.randint(0, 4096, (100,)).tolist()
    other = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = other(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.05
    found = causal(model, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    config = load_model_config(source)
    save_draft(model, source, config, tmp_path / "again", {"format": 1})
    before, after = (
        json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "again")
    )
    assert before == after
    torch.testing.assert_close(causal(load_draft(tmp_path / "again"), tokens), found)


def test_a_draft_keeps_its_number_format(tmp_path: Path) -> None:
    source = random_checkpoint("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halves, source / "model.safetensors")
    save_draft(load_draft(source), source, load_model_config(source), tmp_path / "again", {})
    kinds = {t.dtype for t in load_file(tmp_path / "again" / "model.safetensors").values()}
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "model.extra.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"\(3,\)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}), "int32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, word: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = random_checkpoint("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=word):
        load_draft(source)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    source = random_checkpoint("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        load_draft(source)
