"""The draft as a plain torch module: a small decoder of the Llama family that can be trained.

Its parameters have the names and shapes of a Hugging Face checkpoint, so loading and saving are
reading and writing them; checkpoint.py does it. Whatever the engine drafts with can be trained:
the switches are those of engine/models/config.py. A draft made here is a Llama with tied
embeddings. train.py and learner.py step it, create.py makes it.

Shape legend: B rows, T tokens of a row, E hidden size, H query heads, K key/value heads,
D head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from paceline.engine.models.config import ModelConfig, rope_frequencies
from paceline.trainer.guessing import Guesses, GuessingModel
from paceline.trainer.texts import Batch, Text, pack_tightly

_INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class DraftShape:
    """Sizes of a draft model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})
    """Scaling, as in ModelConfig."""
    windows: tuple[int | None, ...] = ()
    """Sliding window per layer; empty for none in any."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    has_qk_norm: bool = False
    tie_embeddings: bool = True

    @classmethod
    def of_config(cls, config: ModelConfig) -> DraftShape:
        """Return the shape of a checkpoint."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    @property
    def num_parameters(self) -> int:
        """Number of weights of one without biases, those of a tied embedding counted once."""
        hidden, inner = self.hidden_size, self.intermediate_size
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        layer = hidden * (heads * self.head_dim + 3 * inner + 2)
        ends = 1 if self.tie_embeddings else 2
        return hidden * (ends * self.vocab_size + 1) + self.num_layers * layer


class DraftModel(GuessingModel):
    """A decoder of the Llama family (Touvron et al. 2023)."""

    def __init__(self, shape: DraftShape) -> None:
        """Start from small random weights, by torch's global generator."""
        super().__init__()
        self.shape = shape
        self.raw_config: Mapping[str, Any] | None = None
        """Of the checkpoint it was loaded from, in transformers' words; None for a new one."""
        self.weight_dtype = torch.bfloat16
        """In which it is saved."""
        self.model = _Body(shape)
        if not shape.tie_embeddings:
            self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        scale = _INIT_STD / math.sqrt(2 * shape.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # What writes into the residual stream starts smaller (Radford et al. 2019, 2.3).
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=scale if is_output else _INIT_STD)

    def forward(
        self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor, visible_BTT: torch.Tensor
    ) -> torch.Tensor:
        """Return the final hidden states, normalised, [B, T, E].

        Args:
            tokens_BT: token ids.
            positions_BT: of each token in its own text.
            visible_BTT: bool, [b, i, j] whether token i sees token j; each sees itself.
        """
        hidden: torch.Tensor = self.model(tokens_BT, positions_BT, visible_BTT)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states, [..., E] to [..., V]."""
        tied = self.shape.tie_embeddings
        head = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return F.linear(hidden, head)

    def learned_logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits at the positions to learn from, [N, V]."""
        hidden = self(batch.tokens_BR, batch.positions_BR, batch.visible_BRR)
        return self.logits(hidden.flatten(0, 1)[batch.learned_N])

    def guesses(self, texts: Sequence[Text]) -> Iterator[Guesses]:
        """Yield the guess of the next token at every position that counts."""
        batch = pack_tightly(texts)
        if len(batch.learned_N):
            yield Guesses(self.learned_logits(batch), batch.target, batch.weights_N)

    def chain_matches(self, text: Text, depth: int) -> torch.Tensor:
        """Tell of each root which of the next tokens the draft would have said, bool [R, D].

        distribution of token    0 1 2 3 4 ...     of the captured ones
        root 0, depths 1, 2        ^ ^
        root 1                       ^ ^
        """
        for guesses in self.guesses([text]):
            is_right_N = guesses.logits_NV.argmax(-1) == guesses.target.drawn_N
            if len(is_right_N) > depth:
                return is_right_N.unfold(0, depth, 1)[1:]
        return torch.zeros(0, depth, dtype=torch.bool)


class _Body(nn.Module):
    frequencies: torch.Tensor

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self._windows = shape.windows or (None,) * shape.num_layers
        frequencies = rope_frequencies(shape.head_dim, shape.rope_theta, shape.rope)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor, visible_BTT: torch.Tensor
    ) -> torch.Tensor:
        angles = positions_BT[:, None, :, None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos_sin = angles.cos(), angles.sin()
        x_BTE = self.embed_tokens(tokens_BT)
        # Tokens of a text stand side by side, so distances of positions are those of places.
        distances_BTT = positions_BT[:, :, None] - positions_BT[:, None, :]
        for layer, window in zip(self.layers, self._windows, strict=True):
            seen = visible_BTT if window is None else visible_BTT & (distances_BTT < window)
            x_BTE = layer(x_BTE, cos_sin, seen[:, None])
        out_BTE: torch.Tensor = self.norm(x_BTE)
        return out_BTE


class _Layer(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = _Mlp(shape)

    def forward(
        self,
        x_BTE: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        visible_B1TT: torch.Tensor,
    ) -> torch.Tensor:
        x_BTE = x_BTE + self.self_attn(self.input_layernorm(x_BTE), cos_sin, visible_B1TT)
        out_BTE: torch.Tensor = x_BTE + self.mlp(self.post_attention_layernorm(x_BTE))
        return out_BTE


class _Attention(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        hidden, size = shape.hidden_size, shape.head_dim
        self._head_dim = size
        self.q_proj = nn.Linear(hidden, shape.num_heads * size, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(hidden, shape.num_kv_heads * size, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(hidden, shape.num_kv_heads * size, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(shape.num_heads * size, hidden, bias=shape.o_bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(size, shape.rms_norm_eps) if shape.has_qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(
        self,
        x_BTE: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        visible_B1TT: torch.Tensor,
    ) -> torch.Tensor:
        q_BHTD, k_BKTD, v_BKTD = (
            projection(x_BTE).unflatten(-1, (-1, self._head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BHTD = F.scaled_dot_product_attention(
            _rotate(self.q_norm(q_BHTD), *cos_sin),
            _rotate(self.k_norm(k_BKTD), *cos_sin),
            v_BKTD,
            attn_mask=visible_B1TT,
            enable_gqa=True,
        )
        out_BTE: torch.Tensor = self.o_proj(out_BHTD.transpose(1, 2).flatten(2))
        return out_BTE


class _Mlp(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        hidden, inner = shape.hidden_size, shape.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(hidden, inner, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=shape.mlp_bias)

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        out_BTE: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x_BTE)) * self.up_proj(x_BTE))
        return out_BTE


def _rotate(x_BHTD: torch.Tensor, cos_B1TD: torch.Tensor, sin_B1TD: torch.Tensor) -> torch.Tensor:
    """Rotate by position, halves paired (Su et al. 2021; GPT-NeoX layout)."""
    first, second = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos_B1TD + torch.cat((-second, first), dim=-1) * sin_B1TD
