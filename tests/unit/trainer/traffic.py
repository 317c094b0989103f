"""Samples as an engine captures them, drawn from a small target, and drafts to learn from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from paceline.domain.learnings import Sample, TokenOrigin
from paceline.engine.models.config import load_model_config
from paceline.trainer.checkpoint import load_draft, save_draft
from paceline.trainer.decoder import DraftModel
from paceline.trainer.sizes import draft_shape


def small_draft(target: Path, out: Path, hidden: int = 32) -> Path:
    """Write an untrained draft of a target."""
    config = load_model_config(target)
    save_draft(DraftModel(draft_shape(config, 1, hidden)), target, config, out, {"format": 1})
    return out


@torch.no_grad()
def samples_of(
    target: Path,
    count: int,
    *,
    num_context: int = 8,
    num_captured: int = 24,
    top: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    domain: str = "",
    low: int = 0,
    has_hidden: bool = False,
) -> list[Sample]:
    """Let a target continue random contexts of tokens from `low` on."""
    model = load_draft(target)
    generator = torch.Generator().manual_seed(seed)
    vocab = model.shape.vocab_size
    tokens = torch.randint(low, vocab, (count, num_context), generator=generator)
    distributions, states = [], []
    for _ in range(num_captured):
        length = tokens.shape[1]
        positions = torch.arange(length).expand(count, -1)
        visible = torch.ones(count, length, length, dtype=torch.bool).tril()
        states.append(model(tokens, positions, visible)[:, -1])
        logits = model.logits(states[-1])
        distributions.append(logits.softmax(-1))
        if temperature == 0.0:
            drawn = logits.argmax(-1, keepdim=True)
        else:
            drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat((tokens, drawn), dim=1)
    probs, ids = torch.stack(distributions, dim=1).topk(top)
    probs_NK, ids_NK = probs.numpy(), ids.numpy()
    hidden_SNE = torch.stack(states, dim=1).numpy().astype("<f2")
    origins = np.resize(np.array([1, 1, 2, 1, 3, 0], np.uint8), num_captured)
    return [
        Sample(
            tenant=b"t",
            domain=domain,
            draft_version="",
            temperature=temperature,
            first_position=0,
            token_ids=tuple(tokens[i].tolist()),
            num_context=num_context,
            top=top,
            top_ids=ids_NK[i].astype("<i4").tobytes(),
            top_probs=probs_NK[i].astype("<f2").tobytes(),
            tail_mass=(1 - probs_NK[i].sum(-1)).clip(0).astype("<f2").tobytes(),
            origins=origins.tobytes(),
            hidden=hidden_SNE[i].tobytes() if has_hidden else b"",
        )
        for i in range(count)
    ]


def poisoned(sample: Sample, name: str, index: int, value: float) -> Sample:
    """Return a sample with one number of a float16 array replaced."""
    array = np.frombuffer(getattr(sample, name), "<f2").copy()
    array[index] = value
    return replace(sample, **{name: array.tobytes()})


CORRECTED = int(TokenOrigin.CORRECTED)
