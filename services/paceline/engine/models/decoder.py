"""The decoder of the Llama family over paged KV: Llama, Qwen2, Qwen3, Mistral.

Shape legend: N tokens, M rows with logits, H query heads, K key/value heads, D head size,
P pages, L layers, T tokens per page, V vocabulary, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from paceline.engine import kernels
from paceline.engine.kernels import AttentionBatch, QuantisedWeight
from paceline.engine.models.config import ModelConfig, rope_table
from paceline.engine.models.tensors import TensorStore

Weight = torch.Tensor | QuantisedWeight


@dataclass(slots=True)
class _Layer:
    """Weights of one layer; qkv and gate/up are fused, so each is one pass over memory."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    qkv: Weight
    qkv_bias: torch.Tensor | None
    o: Weight
    o_bias: torch.Tensor | None
    gate_up: Weight
    gate_up_bias: torch.Tensor | None
    down: Weight
    down_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None

    def quantise(self) -> None:
        """Bring the weights of products to int8."""
        self.qkv, self.o, self.gate_up, self.down = (
            kernels.quantise_weight(weight) if isinstance(weight, torch.Tensor) else weight
            for weight in (self.qkv, self.o, self.gate_up, self.down)
        )


class DecoderModel:
    """Weights and forward pass of one checkpoint."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        dtype: torch.dtype,
        device: str,
        max_context_tokens: int | None = None,
        is_int8: bool = False,
    ) -> None:
        """Take over the weights; fewer positions than the model's own save memory.

        With `is_int8` the weights of products are quantised, and `dtype` is the activations'.

        Raises:
            UnsupportedModelError: a tensor is missing, unknown, or of another shape or kind.
        """
        self.config = config
        store = TensorStore(weights, dtype, device)
        size = (config.vocab_size, config.hidden_size)
        self._embedding_VE = store.take("model.embed_tokens.weight", size)
        self._layers = [_load_layer(store, config, i) for i in range(config.num_layers)]
        self._norm_E = store.take("model.norm.weight", (config.hidden_size,))
        if config.tie_embeddings:
            store.drop("lm_head.weight")
            self._head_VE: Weight = self._embedding_VE
        else:
            self._head_VE = store.take("lm_head.weight", size)
        store.check_empty()
        if is_int8:
            self._head_VE = kernels.quantise_weight(self._head_VE)
            for layer in self._layers:
                layer.quantise()
        num_positions = max_context_tokens or config.max_context_tokens
        self._cos_sin_C2D = rope_table(config, num_positions).to(device)

    def forward(
        self,
        tokens_N: torch.Tensor,
        positions_N: torch.Tensor,
        kv_PL2KTD: torch.Tensor,
        slots_N: torch.Tensor,
        attention: AttentionBatch,
        skip: Sequence[tuple[bool, bool]] | None = None,
    ) -> torch.Tensor:
        """Compute all tokens, store their KV, return the last layer's residuals, [N, E].

        A residual that is finite vouches for the KV stored with it: whatever a token stores
        also enters its own attention.
        """
        x_NE = self._embedding_VE[tokens_N]
        for index, layer in enumerate(self._layers):
            kv_P2KTD, window = kv_PL2KTD[:, index], self.config.windows[index]
            skips_attention, skips_mlp = (False, False) if skip is None else skip[index]
            if not skips_attention:
                h_NE = kernels.rms_norm(x_NE, layer.input_norm, self.config.rms_norm_eps)
                x_NE = x_NE + self._attend(
                    layer, h_NE, positions_N, kv_P2KTD, slots_N, attention, window
                )
            if not skips_mlp:
                h_NE = kernels.rms_norm(x_NE, layer.post_norm, self.config.rms_norm_eps)
                gate_up = kernels.linear(h_NE, layer.gate_up, layer.gate_up_bias)
                x_NE = x_NE + kernels.linear(kernels.silu_mul(gate_up), layer.down, layer.down_bias)
        return x_NE

    def logits(self, x_NE: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
        """Return float32 logits of some rows of residuals, [M, V]."""
        return kernels.linear(self.hidden(x_NE, rows_M), self._head_VE).float()

    def hidden(self, x_NE: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
        """Return what the head sees of some rows of residuals, [M, E]."""
        return kernels.rms_norm(x_NE[rows_M], self._norm_E, self.config.rms_norm_eps)

    def _attend(
        self,
        layer: _Layer,
        h_NE: torch.Tensor,
        positions_N: torch.Tensor,
        kv_P2KTD: torch.Tensor,
        slots_N: torch.Tensor,
        attention: AttentionBatch,
        window: int | None,
    ) -> torch.Tensor:
        config = self.config
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = kernels.linear(h_NE, layer.qkv, layer.qkv_bias)
        q, k, v = qkv.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
        q_NHD, k_NKD = q.unflatten(-1, (heads, size)), k.unflatten(-1, (kv_heads, size))
        if layer.q_norm is not None and layer.k_norm is not None:
            q_NHD = kernels.rms_norm(q_NHD, layer.q_norm, config.rms_norm_eps)
            k_NKD = kernels.rms_norm(k_NKD, layer.k_norm, config.rms_norm_eps)
        q_NHD, k_NKD = kernels.rotary(q_NHD, k_NKD, self._cos_sin_C2D, positions_N)
        kernels.write_kv(k_NKD, v.unflatten(-1, (kv_heads, size)), kv_P2KTD, slots_N)
        out_NHD = kernels.paged_attention(
            q_NHD.to(kv_P2KTD.dtype), kv_P2KTD, attention, size**-0.5, window=window
        )
        return kernels.linear(out_NHD.flatten(1).to(h_NE.dtype), layer.o, layer.o_bias)


def _load_layer(store: TensorStore, config: ModelConfig, index: int) -> _Layer:
    base = f"model.layers.{index}"
    attention, mlp = f"{base}.self_attn", f"{base}.mlp"
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * size, config.num_kv_heads * size
    qkv, sizes = [f"{attention}.{n}_proj" for n in "qkv"], [q_size, kv_size, kv_size]
    gate_up = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
    has_norm, mlp_bias = config.has_qk_norm, config.mlp_bias
    return _Layer(
        input_norm=store.take(f"{base}.input_layernorm.weight", (hidden,)),
        post_norm=store.take(f"{base}.post_attention_layernorm.weight", (hidden,)),
        qkv=store.fuse([f"{n}.weight" for n in qkv], sizes, hidden),
        qkv_bias=store.fuse([f"{n}.bias" for n in qkv], sizes) if config.qkv_bias else None,
        o=store.take(f"{attention}.o_proj.weight", (hidden, q_size)),
        o_bias=store.take(f"{attention}.o_proj.bias", (hidden,)) if config.o_bias else None,
        gate_up=store.fuse([f"{n}.weight" for n in gate_up], [inner, inner], hidden),
        gate_up_bias=store.fuse([f"{n}.bias" for n in gate_up], [inner, inner])
        if mlp_bias
        else None,
        down=store.take(f"{mlp}.down_proj.weight", (hidden, inner)),
        down_bias=store.take(f"{mlp}.down_proj.bias", (hidden,)) if mlp_bias else None,
        q_norm=store.take(f"{attention}.q_norm.weight", (size,)) if has_norm else None,
        k_norm=store.take(f"{attention}.k_norm.weight", (size,)) if has_norm else None,
    )
