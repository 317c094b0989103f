"""A draft on disk: a Hugging Face checkpoint with the target's tokenizer and a card.

The directory loads wherever its target loads. It appears whole or not at all: everything is
written beside it and moved. What is borrowed from the target is here too.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from paceline.domain.errors import InvalidRequestError
from paceline.engine.models.config import ModelConfig, UnsupportedModelError
from paceline.engine.weights import load_tensors
from paceline.trainer.decoder import DraftModel, DraftShape

CARD = "paceline_draft.json"
"""Name of the file that says how a draft was made."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja"),
)

_PROJECTION_ROWS = 16384
"""Tokens from which the main directions of an embedding are taken; enough for any width."""


def target_head(directory: Path) -> torch.Tensor:
    """Return the target's output matrix, float32 [V, E].

    Raises:
        UnsupportedModelError: the checkpoint has none.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in load_tensors(directory):
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            found[name] = tensor
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if name in found:
            return found[name].float()
    raise UnsupportedModelError("tensor model.embed_tokens.weight is missing from the checkpoint")


def borrow_embedding(model: DraftModel, head_VE: torch.Tensor) -> None:
    """Start the draft's embedding from the target's, in its main directions.

    The projection on the leading right singular vectors keeps the most of the distances between
    tokens that so few dimensions can.
    """
    width = min(model.shape.hidden_size, head_VE.shape[1])
    stride = max(1, len(head_VE) // _PROJECTION_ROWS)
    sample = head_VE[::stride]
    _, directions_EE = torch.linalg.eigh(sample.T @ sample)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :width] = head_VE @ directions_EE[:, -width:]


def check_place(out: Path, overwrite: bool) -> None:
    """Refuse a place where a draft cannot or must not be written.

    Raises:
        InvalidRequestError: it is no directory, or has files that are not to be replaced.
        OSError: the directory around it is missing or not writable.
    """
    if out.exists() and not out.is_dir():
        raise InvalidRequestError("out", f"{out} is not a directory")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InvalidRequestError("out", f"{out} is not empty; --overwrite replaces a draft")
        if not (out / CARD).is_file():
            raise InvalidRequestError("out", f"{out} has no {CARD}, so it is no draft to replace")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent):
        pass  # It can be written; what is found out now is not found out after an hour.


def save_draft(
    model: DraftModel, target: Path, config: ModelConfig, out: Path, card: Mapping[str, Any]
) -> None:
    """Write a draft as `out`; one that is there is replaced, files beside it (a README) stay.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        tensors = {
            name: tensor.detach().to(torch.bfloat16).contiguous()
            for name, tensor in model.state_dict().items()
        }
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        _write_json(staging / "config.json", _config(model.shape, target, config))
        _write_json(staging / CARD, card)
        for name in TOKENIZER_FILES:
            if (target / name).is_file():
                shutil.copyfile(target / name, staging / name)
        # Both are made for their owner only.
        staging.chmod(0o755)
        (staging / "model.safetensors").chmod(0o644)
        _replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, out: Path) -> None:
    """Put a directory in the place of another; what else was in there moves along."""
    if not out.exists():
        staging.rename(out)
        return
    for path in out.iterdir():
        if path.is_file() and not (staging / path.name).exists():
            shutil.copy2(path, staging / path.name)
    # A directory that is not empty cannot be renamed over; the old one steps aside first.
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent)) / "old"
    out.rename(aside)
    try:
        staging.rename(out)
    except OSError:
        aside.rename(out)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)


def _config(shape: DraftShape, target: Path, config: ModelConfig) -> dict[str, Any]:
    raw = json.loads((target / "config.json").read_text(encoding="utf-8"))
    eos = list(config.eos_token_ids)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_context_tokens,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": raw.get("pad_token_id"),
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
