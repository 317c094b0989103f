"""The decoder of the Llama family over paged KV: Llama, Qwen2, Qwen3, Mistral.

Shape legend: N tokens, M rows with logits, H query heads, K key/value heads, D head size,
P pages, L layers, T tokens per page, V vocabulary, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from paceline.engine import kernels
from paceline.engine.kernels import AttentionBatch
from paceline.engine.models.config import ModelConfig, UnsupportedModelError, rope_table

_SERVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Plain numbers; narrower ones need scales that only their format knows."""


@dataclass(slots=True)
class _Layer:
    """Weights of one layer; qkv and gate/up are fused, so each is one pass over memory."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


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
    ) -> None:
        """Take over the weights; fewer positions than the model's own save memory.

        Raises:
            UnsupportedModelError: a tensor is missing, unknown, or of another shape or kind.
        """
        self.config = config
        store = _Weights(weights, dtype, device)
        size = (config.vocab_size, config.hidden_size)
        self._embedding_VE = store.take("model.embed_tokens.weight", size)
        self._layers = [_load_layer(store, config, i) for i in range(config.num_layers)]
        self._norm_E = store.take("model.norm.weight", (config.hidden_size,))
        if config.tie_embeddings:
            store.drop("lm_head.weight")
            self._head_VE = self._embedding_VE
        else:
            self._head_VE = store.take("lm_head.weight", size)
        store.check_empty()
        num_positions = max_context_tokens or config.max_context_tokens
        self._cos_sin_C2D = rope_table(config, num_positions).to(device)

    def forward(
        self,
        tokens_N: torch.Tensor,
        positions_N: torch.Tensor,
        kv_PL2KTD: torch.Tensor,
        slots_N: torch.Tensor,
        attention: AttentionBatch,
    ) -> torch.Tensor:
        """Compute all tokens, store their KV, return the last layer's residuals, [N, E].

        A residual that is finite vouches for the KV stored with it: whatever a token stores
        also enters its own attention.
        """
        config = self.config
        x_NE = self._embedding_VE[tokens_N]
        for index, layer in enumerate(self._layers):
            kv_P2KTD = kv_PL2KTD[:, index]
            h_NE = kernels.rms_norm(x_NE, layer.input_norm, config.rms_norm_eps)
            x_NE = x_NE + self._attend(
                layer, h_NE, positions_N, kv_P2KTD, slots_N, attention, config.windows[index]
            )
            h_NE = kernels.rms_norm(x_NE, layer.post_norm, config.rms_norm_eps)
            gate_up = kernels.linear(h_NE, layer.gate_up, layer.gate_up_bias)
            x_NE = x_NE + kernels.linear(kernels.silu_mul(gate_up), layer.down, layer.down_bias)
        return x_NE

    def logits(self, x_ME: torch.Tensor) -> torch.Tensor:
        """Return float32 logits of residuals, [M, V]."""
        h_ME = kernels.rms_norm(x_ME, self._norm_E, self.config.rms_norm_eps)
        return kernels.linear(h_ME, self._head_VE).float()

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
        out_NHD = kernels.paged_attention(q_NHD, kv_P2KTD, attention, size**-0.5, window=window)
        return kernels.linear(out_NHD.flatten(1), layer.o, layer.o_bias)


class _Weights:
    """Hands out a checkpoint's tensors once each, checked and cast.

    The tensors are views of the mapped files, so nothing is read before it is taken, and what
    needs neither cast nor fusion stays the file's own memory.
    """

    def __init__(
        self, weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, device: str
    ) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            if name in self._tensors:
                raise UnsupportedModelError(f"tensor {name} is in the checkpoint twice")
            self._tensors[name] = tensor
        self._dtype = dtype
        self._device = device

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Remove and return a tensor.

        Raises:
            UnsupportedModelError: it is missing, quantised, or has another shape.
        """
        return self._pop(name, shape).to(self._device, self._dtype)

    def fuse(self, names: list[str], sizes: list[int], *tail: int) -> torch.Tensor:
        """Remove several tensors and return them joined along their first dimension."""
        fused = torch.empty(sum(sizes), *tail, dtype=self._dtype, device=self._device)
        for name, part in zip(names, fused.split(sizes), strict=True):
            part.copy_(self._pop(name, tuple(part.shape)))
        return fused

    def _pop(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise UnsupportedModelError(f"tensor {name} is missing from the checkpoint")
        if tuple(tensor.shape) != shape:
            raise UnsupportedModelError(f"tensor {name}: {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype not in _SERVED_DTYPES:
            raise UnsupportedModelError(f"tensor {name}: {tensor.dtype} is not supported")
        return tensor

    def drop(self, name: str) -> None:
        """Ignore a tensor."""
        self._tensors.pop(name, None)

    def check_empty(self) -> None:
        """Refuse a checkpoint with tensors that nothing used, rotary buffers excepted."""
        left = sorted(n for n in self._tensors if not n.endswith("rotary_emb.inv_freq"))
        if left:
            raise UnsupportedModelError(f"unexpected tensors: {', '.join(left[:4])}")


def _load_layer(store: _Weights, config: ModelConfig, index: int) -> _Layer:
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
