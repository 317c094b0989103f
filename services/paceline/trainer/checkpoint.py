"""A draft on disk: a Hugging Face checkpoint with the target's tokenizer and a card.

The directory loads wherever its target loads. It appears whole or not at all: everything is
written beside it and moved. What is borrowed from the target is here too. A draft that was loaded
keeps its configuration and its format when it is saved again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from paceline.domain.errors import InvalidRequestError
from paceline.engine.models.config import ModelConfig, UnsupportedModelError, load_model_config
from paceline.engine.weights import load_tensors
from paceline.trainer.decoder import DraftModel, DraftShape
from paceline.trainer.files import write_json, write_tensors

CARD = "paceline_draft.json"
"""Name of the file that says how a draft was made."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja"),
)

_PROJECTION_ROWS = 16384
"""Tokens from which the main directions of an embedding are taken; enough for any width."""


_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def load_draft(directory: Path) -> DraftModel:
    """Load a draft to train it; its weights become float32.

    Raises:
        UnsupportedModelError: the engine could not draft with it; says why.
    """
    config = load_model_config(directory)
    model = DraftModel(DraftShape.of_config(config))
    model.raw_config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    wanted = dict(model.named_parameters())
    for name, tensor in load_tensors(directory):
        is_derived = name.endswith("rotary_emb.inv_freq")
        if is_derived or (name == "lm_head.weight" and config.tie_embeddings):
            continue
        parameter = wanted.pop(name, None)
        if parameter is None:
            raise UnsupportedModelError(f"tensor {name} is unknown, or there twice")
        if parameter.shape != tensor.shape or tensor.dtype not in _FORMATS:
            raise UnsupportedModelError(
                f"tensor {name}: {tensor.dtype} {tuple(tensor.shape)},"
                f" expected {tuple(parameter.shape)}"
            )
        parameter.data.copy_(tensor)
        model.weight_dtype = tensor.dtype
    if wanted:
        raise UnsupportedModelError(f"tensor {min(wanted)} is missing from the checkpoint")
    return model


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

    Args:
        model: of the target's vocabulary.
        target: directory whose tokenizer is taken: the target's, or that of an earlier draft.
        config: of `target`.
        out: directory to make.
        card: how it was made.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    with whole(out) as staging:
        tensors = {name: tensor.to(model.weight_dtype) for name, tensor in model.named_parameters()}
        write_tensors(staging / "model.safetensors", tensors)
        write_json(
            staging / "config.json", model.raw_config or _config(model.shape, target, config)
        )
        write_json(staging / CARD, card)
        generation = () if model.raw_config is None else ("generation_config.json",)
        for name in (*TOKENIZER_FILES, *generation):
            if (target / name).is_file():
                shutil.copyfile(target / name, staging / name)


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Yield a directory to fill; at the end it takes the place of `out`, or nothing is left of it.

    Files of an `out` that is there and are not written anew stay.

    Raises:
        OSError: it cannot be written.
    """
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield staging
        # It is made for its owner only.
        staging.chmod(0o755)
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
