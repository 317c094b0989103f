"""The same decoder as decoder.py in one call per step, where the C++ kernels were built.

Shape legend as in decoder.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from paceline.engine.kernels import (
    AttentionBatch,
    DecoderShape,
    FusedDecoder,
    LayerTensors,
    rms_norm,
)
from paceline.engine.models.config import ModelConfig, rope_table
from paceline.engine.models.tensors import TensorStore


class FusedModel:
    """Packed weights and forward pass of one checkpoint."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        weight_type: str,
        kv_dtype: torch.dtype,
        block_size: int,
        max_context_tokens: int | None = None,
    ) -> None:
        """Pack the weights: "f32", "bf16" or "int8".

        Raises:
            UnsupportedModelError: a tensor is missing, unknown, or of another shape or kind.
        """
        self.config = config
        store = TensorStore(weights, dtype=None)
        shape = DecoderShape(
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            layers=config.num_layers,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_size=config.head_dim,
            vocab=config.vocab_size,
            block_size=block_size,
            eps=config.rms_norm_eps,
        )
        self._decoder = FusedDecoder(shape, weight_type=weight_type, kv_dtype=kv_dtype)
        size = (config.vocab_size, config.hidden_size)
        embedding_VE = store.take("model.embed_tokens.weight", size)
        for index in range(config.num_layers):
            self._decoder.set_layer(index, _layer_tensors(store, config, index))
        norm_E = store.take("model.norm.weight", (config.hidden_size,))
        head_VE = embedding_VE
        if config.tie_embeddings:
            store.drop("lm_head.weight")
        else:
            head_VE = store.take("lm_head.weight", size)
        store.check_empty()
        self._decoder.set_ends(embedding_VE, head_VE, norm_E)
        self._norm_E = norm_E.float()
        num_positions = max_context_tokens or config.max_context_tokens
        self._cos_sin_C2D = rope_table(config, num_positions).contiguous()

    def forward(
        self,
        tokens_N: torch.Tensor,
        positions_N: torch.Tensor,
        kv_PL2KTD: torch.Tensor,
        slots_N: torch.Tensor,
        attention: AttentionBatch,
        skip: Sequence[tuple[bool, bool]] | None = None,
    ) -> torch.Tensor:
        """Compute all tokens, store their KV, return the last layer's residuals, f32 [N, E]."""
        return self._decoder.forward(
            tokens_N, positions_N, self._cos_sin_C2D, kv_PL2KTD, slots_N, attention, skip
        )

    def logits(self, x_NE: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
        """Return float32 logits of some rows of residuals, [M, V]."""
        return self._decoder.logits(x_NE, rows_M)

    def hidden(self, x_NE: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
        """Return what the head sees of some rows of residuals, f32 [M, E]."""
        return rms_norm(x_NE[rows_M], self._norm_E, self.config.rms_norm_eps)


def _layer_tensors(store: TensorStore, config: ModelConfig, index: int) -> LayerTensors:
    base = f"model.layers.{index}"
    attention, mlp = f"{base}.self_attn", f"{base}.mlp"
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * size, config.num_kv_heads * size
    q, k, v = (
        store.take(f"{attention}.{name}_proj.weight", (rows, hidden))
        for name, rows in (("q", q_size), ("k", kv_size), ("v", kv_size))
    )

    def bias(has_bias: bool, *parts: tuple[str, int]) -> torch.Tensor | None:
        """Join the parts' biases, which are small enough to copy."""
        if not has_bias:
            return None
        return torch.cat([store.take(f"{name}.bias", (rows,)).float() for name, rows in parts])

    def norm(name: str, rows: int) -> torch.Tensor:
        return store.take(f"{name}.weight", (rows,))

    return LayerTensors(
        qkv=(q, k, v),
        o=store.take(f"{attention}.o_proj.weight", (hidden, q_size)),
        gate_up=(
            store.take(f"{mlp}.gate_proj.weight", (inner, hidden)),
            store.take(f"{mlp}.up_proj.weight", (inner, hidden)),
        ),
        down=store.take(f"{mlp}.down_proj.weight", (hidden, inner)),
        input_norm=norm(f"{base}.input_layernorm", hidden),
        post_norm=norm(f"{base}.post_attention_layernorm", hidden),
        q_norm=norm(f"{attention}.q_norm", size) if config.has_qk_norm else None,
        k_norm=norm(f"{attention}.k_norm", size) if config.has_qk_norm else None,
        qkv_bias=bias(
            config.qkv_bias,
            (f"{attention}.q_proj", q_size),
            (f"{attention}.k_proj", kv_size),
            (f"{attention}.v_proj", kv_size),
        ),
        o_bias=bias(config.o_bias, (f"{attention}.o_proj", hidden)),
        gate_up_bias=bias(config.mlp_bias, (f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)),
        down_bias=bias(config.mlp_bias, (f"{mlp}.down_proj", hidden)),
        window=config.windows[index],
    )
