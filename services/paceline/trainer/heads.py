"""Medusa heads in training: residual blocks on the target's hidden states, before its own head.

    row of a sample        0    1    2    3     the state behind which token i was drawn, and its
    head 0, state of row   0 -> 1               distribution
    head 1                 0 ------> 2
    head 2                 0 -----------> 3

Head k learns at row i what the target said at row i + k + 1 of the same sample. The blocks learn,
the target's head does not, so a file of heads does not grow with the vocabulary; heads that were
loaded with matrices of their own keep those as they are. Medusa-1 (Cai et al. 2024, section
2.2): the target stays frozen. engine/spec/drafters/medusa.py drafts with what is saved here.

Shape legend: E hidden size, V vocabulary, N guesses, R roots, D depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from paceline.engine.models.config import load_model_config
from paceline.engine.spec.drafters.medusa import lm_head_of, load_for_target
from paceline.engine.spec.drafters.medusa_file import MedusaConfig, MedusaHead, save_medusa
from paceline.engine.weights import model_digest
from paceline.trainer.checkpoint import CARD, whole
from paceline.trainer.files import write_json
from paceline.trainer.guessing import Guesses, GuessingModel
from paceline.trainer.texts import Text, target_probs

_HEAD_DECAY = 0.8
"""Weight of a head's loss against that of the one before it (section 2.2): what comes later is
harder to know, and less often tried."""


class HeadsModel(GuessingModel):
    """Heads of one target."""

    def __init__(self, config: MedusaConfig, lm_head_VE: torch.Tensor) -> None:
        """Start as Medusa-1 does: blocks add nothing, so each head says what the target says next.

        Args:
            config: their sizes.
            lm_head_VE: the target's.
        """
        super().__init__()
        self.config = config
        self.weight_dtype = torch.bfloat16
        """In which blocks are saved."""
        size = config.hidden_size
        self._heads = [
            [nn.Linear(size, size) for _ in range(config.num_layers)]
            for _ in range(config.num_heads)
        ]
        self.blocks = nn.ModuleList(nn.ModuleList(blocks) for blocks in self._heads)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        # Not parameters: neither learned nor part of a learner's state.
        self._lm_head_VE = lm_head_VE.float()
        self._own_VE: list[torch.Tensor | None] = [None] * config.num_heads

    def take(self, heads: Sequence[MedusaHead]) -> None:
        """Take over loaded heads of the same sizes."""
        for k, head in enumerate(heads):
            for block, (weight_EE, bias_E) in zip(self._heads[k], head.blocks, strict=True):
                block.weight.data.copy_(weight_EE)
                block.bias.data.copy_(bias_E)
                self.weight_dtype = weight_EE.dtype
            self._own_VE[k] = head.head_VE

    def become(self, other: HeadsModel) -> None:
        """Take over what other heads of the same sizes are."""
        self.load_state_dict(other.state_dict())
        self.weight_dtype, self._own_VE = other.weight_dtype, list(other._own_VE)

    def logits(self, head: int, hidden_NE: torch.Tensor) -> torch.Tensor:
        """Return what a head says of hidden states, [N, V]."""
        x_NE = hidden_NE
        for block in self._heads[head]:
            x_NE = x_NE + F.silu(block(x_NE))
        own_VE = self._own_VE[head]
        return F.linear(x_NE, self._lm_head_VE if own_VE is None else own_VE.float())

    def guesses(self, texts: Sequence[Text]) -> Iterator[Guesses]:
        """Yield each head's guesses of the tokens that count."""
        for k in range(self.config.num_heads):
            picked = [(text, places) for text in texts if len(places := _places(text, k))]
            if not picked:
                continue
            states = [_states(text)[places - text.first - k - 1] for text, places in picked]
            hidden_NE = torch.from_numpy(np.concatenate(states).astype(np.float32))
            weights_N = np.concatenate([text.weights_T[places] for text, places in picked])
            yield Guesses(
                self.logits(k, hidden_NE),
                target_probs(picked),
                torch.from_numpy(weights_N) * _HEAD_DECAY**k,
            )

    def chain_matches(self, text: Text, depth: int) -> torch.Tensor:
        """Tell of each root what its state let each head say rightly, bool [R, D].

        Raises:
            ValueError: there are fewer heads than that.
        """
        if depth > self.config.num_heads:
            raise ValueError(f"chains of {depth} tokens, there are {self.config.num_heads} heads")
        is_right = [
            guesses.logits_NV.argmax(-1) == guesses.target.drawn_N
            for guesses in self.guesses([text])
        ]
        num_roots = len(is_right[depth - 1]) if len(is_right) >= depth else 0
        if not num_roots:
            return torch.zeros(0, depth, dtype=torch.bool)
        return torch.stack([is_right_N[:num_roots] for is_right_N in is_right[:depth]], dim=1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what is saved, by the names of medusa_file.py."""
        found: dict[str, torch.Tensor] = {}
        for k, own_VE in enumerate(self._own_VE):
            for i, block in enumerate(self._heads[k]):
                found[f"{k}.{i}.linear.weight"] = block.weight.detach().to(self.weight_dtype)
                found[f"{k}.{i}.linear.bias"] = block.bias.detach().to(self.weight_dtype)
            if own_VE is not None:
                found[f"{k}.{self.config.num_layers}.weight"] = own_VE
        return found


def _places(text: Text, head: int) -> npt.NDArray[np.int64]:
    """Return the positions whose distributions a head learns: those that count and have a state.

    tokens     [ context | first . . . . ]
    states                 0 1 2 3 4
    head 0                   ^ ^ ^ ^         the last token of a text has no successor
    """
    begin = text.first + head + 1
    end = min(text.first + len(_states(text)), len(text.tokens_T) - 1)
    return np.flatnonzero(text.weights_T[begin:end]) + begin


def _states(text: Text) -> npt.NDArray[np.float16]:
    assert text.hidden_TE is not None, "a text without hidden states teaches no head"
    return text.hidden_TE


def new_heads(target: Path, num_heads: int, num_layers: int) -> HeadsModel:
    """Return heads that have learned nothing.

    Raises:
        UnsupportedModelError: the target is no checkpoint.
    """
    config = load_model_config(target)
    sizes = MedusaConfig(
        num_heads, num_layers, config.hidden_size, config.vocab_size, model_digest(target)
    )
    return HeadsModel(sizes, lm_head_of(target, config))


def load_heads(directory: Path, target: Path) -> HeadsModel:
    """Load heads to train them; blocks become float32.

    Raises:
        UnsupportedModelError: they cannot be loaded, or are another model's.
    """
    config, heads, lm_head_VE = load_for_target(directory, target)
    model = HeadsModel(config, lm_head_VE)
    model.take(heads)
    return model


def save_heads(model: HeadsModel, out: Path, card: Mapping[str, Any]) -> None:
    """Write heads as `out`, whole or not at all.

    Raises:
        OSError: they cannot be written; nothing is left behind.
    """
    with whole(out) as staging:
        try:
            save_medusa(staging, model.tensors(), model.config)
        except SafetensorError as error:
            raise OSError(f"{out}: {error}") from error
        write_json(staging / CARD, card)
