"""Reads a checkpoint's config.json into the few numbers the decoder needs.

Both spellings of transformers 4 and 5 are read. Whatever would change the result and is not
implemented is refused by name, never ignored.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paceline.domain.errors import PacelineError


class UnsupportedModelError(PacelineError):
    """The checkpoint cannot be served; the message names the key and its value."""

    reason = "unsupported-model"


@dataclass(frozen=True, slots=True)
class _Features:
    """What sets an architecture apart from Llama."""

    qkv_bias: bool = False
    has_qk_norm: bool = False


ARCHITECTURES = {
    "LlamaForCausalLM": _Features(),
    "Qwen2ForCausalLM": _Features(qkv_bias=True),
    "Qwen3ForCausalLM": _Features(has_qk_norm=True),
    "MistralForCausalLM": _Features(),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_context_tokens: int
    rope_theta: float
    rope: dict[str, Any]
    """Scaling parameters; `rope_type` is "default", "linear" or "llama3"."""
    windows: tuple[int | None, ...]
    """Sliding window per layer; None attends to everything."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    has_qk_norm: bool
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]


def load_model_config(directory: Path) -> ModelConfig:
    """Read a checkpoint's configuration.

    Raises:
        UnsupportedModelError: no such file, or something in it is not implemented.
    """
    raw = _read_json(directory / "config.json")
    names = raw.get("architectures") or [None]
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architectures: {names[0]!r}; served are {', '.join(sorted(ARCHITECTURES))}"
        )
    for key, served in (("hidden_act", "silu"), ("quantization_config", None)):
        if raw.get(key, served) != served:
            raise UnsupportedModelError(f"{key}: {raw[key]!r} is not supported")
    features = ARCHITECTURES[names[0]]
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedModelError(f"rope_type: {kind!r}; served are default, linear, llama3")
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=names[0],
        vocab_size=raw["vocab_size"],
        hidden_size=hidden,
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        rms_norm_eps=raw["rms_norm_eps"],
        max_context_tokens=raw["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        rope=rope,
        windows=_windows(raw, names[0]),
        qkv_bias=features.qkv_bias or bias,
        o_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        has_qk_norm=features.has_qk_norm,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_token_ids=_eos_token_ids(directory, raw),
    )


def rope_table(config: ModelConfig) -> torch.Tensor:
    """Return cosines and sines per position, float32 [C, 2, D].

    Frequencies follow Su et al. 2021; "llama3" smooths them as in the Llama 3.1 release.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    frequencies = 1.0 / (config.rope_theta ** (half / config.head_dim))
    if config.rope["rope_type"] == "linear":
        frequencies = frequencies / config.rope["factor"]
    elif config.rope["rope_type"] == "llama3":
        frequencies = _llama3(frequencies, config.rope)
    angles = torch.outer(torch.arange(config.max_context_tokens).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def _llama3(frequencies: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    factor, old_context = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (old_context / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > old_context / low, frequencies / factor, frequencies)
    is_medium = (wavelengths <= old_context / low) & (wavelengths >= old_context / high)
    return torch.where(is_medium, blended, scaled)


def _windows(raw: dict[str, Any], architecture: str) -> tuple[int | None, ...]:
    layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    if window is None or (architecture != "MistralForCausalLM" and not raw.get("use_sliding_window")):
        return (None,) * layers
    kinds = raw.get("layer_types")
    if kinds is None and architecture != "MistralForCausalLM":
        full = raw.get("max_window_layers", layers)
        return tuple(None if i < full else window for i in range(layers))
    if kinds is None:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _eos_token_ids(directory: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    eos = _read_json(path).get("eos_token_id") if path.exists() else None
    if eos is None:
        eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path.name}: {error}") from error
    if not isinstance(data, dict):
        raise UnsupportedModelError(f"{path.name}: not a JSON object")
    return data
