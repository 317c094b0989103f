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

from paceline.engine.checkpoint_files import UnsupportedModelError as UnsupportedModelError


@dataclass(frozen=True, slots=True)
class _Features:
    """What sets an architecture apart from Llama, and what transformers assumes for lost keys."""

    has_qkv_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    has_qk_norm: bool = False
    has_switched_window: bool = False
    """Whether `use_sliding_window` decides about a window, and `max_window_layers` where."""
    has_window: bool = False
    default_kv_heads: int | None = None
    default_head_dim: int | None = None


ARCHITECTURES = {
    "LlamaForCausalLM": _Features(reads_attention_bias=True, reads_mlp_bias=True),
    "Qwen2ForCausalLM": _Features(has_qkv_bias=True, has_switched_window=True, default_kv_heads=32),
    "Qwen3ForCausalLM": _Features(
        reads_attention_bias=True,
        has_qk_norm=True,
        has_switched_window=True,
        default_kv_heads=32,
        default_head_dim=128,
    ),
    "MistralForCausalLM": _Features(has_window=True, default_kv_heads=8),
}

_DEFAULT_WINDOW = 4096
_DEFAULT_FULL_LAYERS = 28

_ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
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
    raw = _Keys(_read_json(directory / "config.json"))
    names = raw.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else names
    features = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if features is None or not isinstance(architecture, str):
        raise UnsupportedModelError(
            f"architectures: {architecture!r}; served are {', '.join(sorted(ARCHITECTURES))}"
        )
    raw.require("hidden_act", "silu", default="silu")
    raw.require("quantization_config", None, default=None)
    heads = raw.count("num_attention_heads")
    kv_heads = raw.count("num_key_value_heads", features.default_kv_heads or heads, null=heads)
    hidden = raw.count("hidden_size")
    even = hidden // heads
    head_dim = raw.count("head_dim", features.default_head_dim or even, null=even)
    if heads % kv_heads:
        raise UnsupportedModelError(f"num_key_value_heads: {kv_heads} does not divide {heads}")
    if head_dim % 2:
        raise UnsupportedModelError(f"head_dim: {head_dim} is odd, rotary embedding needs pairs")
    max_context = raw.count("max_position_embeddings")
    rope = _rope(raw, max_context)
    bias = features.reads_attention_bias and raw.flag("attention_bias")
    return ModelConfig(
        architecture=architecture,
        vocab_size=raw.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=raw.count("intermediate_size"),
        num_layers=raw.count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=raw.number("rms_norm_eps", 1e-6),
        max_context_tokens=max_context,
        rope_theta=rope.pop("rope_theta"),
        rope=rope,
        windows=_windows(raw, architecture, features),
        qkv_bias=features.has_qkv_bias or bias,
        o_bias=bias,
        mlp_bias=features.reads_mlp_bias and raw.flag("mlp_bias"),
        has_qk_norm=features.has_qk_norm,
        tie_embeddings=raw.flag("tie_word_embeddings"),
        eos_token_ids=_eos_token_ids(directory, raw),
    )


class _Keys:
    """A JSON object whose values are checked as they are read; errors name the key."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value as it is."""
        return self._values.get(key, default)

    def count(self, key: str, default: int | None = None, *, null: int | None = None) -> int:
        """Return a positive integer; `null` stands for an explicit null."""
        value = self._values.get(key, default)
        if value is None and key in self._values:
            value = null
        if value is None:
            raise UnsupportedModelError(f"{key}: missing")
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UnsupportedModelError(f"{key}: {value!r} is not a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number."""
        value = self._values.get(key, default)
        if value is None:
            raise UnsupportedModelError(f"{key}: missing")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise UnsupportedModelError(f"{key}: {value!r} is not a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return a boolean; missing and null are false."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise UnsupportedModelError(f"{key}: {value!r} is not a boolean")
        return bool(value)

    def require(self, key: str, served: Any, *, default: Any) -> None:
        """Refuse any other value than the one that is served."""
        if self._values.get(key, default) != served:
            raise UnsupportedModelError(f"{key}: {self._values[key]!r} is not supported")


def rope_table(config: ModelConfig, num_positions: int) -> torch.Tensor:
    """Return cosines and sines per position, float32 [C, 2, D]."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope)
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def rope_frequencies(head_dim: int, rope_theta: float, rope: dict[str, Any]) -> torch.Tensor:
    """Return the angle per position of each pair of elements, float32 [D / 2].

    They follow Su et al. 2021; "llama3" smooths them as in the Llama 3.1 release.
    """
    half = torch.arange(0, head_dim, 2, dtype=torch.int64).float()
    frequencies = 1.0 / (rope_theta ** (half / head_dim))
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    factor, old_context = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (old_context / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > old_context / low, frequencies / factor, frequencies)
    is_medium = (wavelengths <= old_context / low) & (wavelengths >= old_context / high)
    return torch.where(is_medium, blended, scaled)


def _rope(raw: _Keys, max_context: int) -> dict[str, Any]:
    """Return `rope_type`, `rope_theta` and the type's own parameters."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedModelError(f"rope_parameters: {given!r} is not supported")
    values = {"rope_theta": raw.get("rope_theta", 10000.0), **given}
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in _ROPE_PARAMETERS:
        served = ", ".join(_ROPE_PARAMETERS)
        raise UnsupportedModelError(f"rope_type: {kind!r}; served are {served}")
    for source in (raw, _Keys(values)):
        if source.get("partial_rotary_factor") not in (None, 1, 1.0):
            source.require("partial_rotary_factor", 1.0, default=1.0)
    if kind == "llama3":
        name = "original_max_position_embeddings"
        values[name] = raw.get(name) or values.get(name) or max_context
    keys = _Keys(values)
    names = ("rope_theta", *_ROPE_PARAMETERS[kind])
    return {"rope_type": kind, **{name: keys.number(name) for name in names}}


def _windows(raw: _Keys, architecture: str, features: _Features) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, by the rules of transformers' configurations."""
    layers = raw.count("num_hidden_layers")
    kinds = raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        raise UnsupportedModelError(f"layer_types: {kinds!r} for {layers} layers")
    unknown = set(map(str, kinds or ())) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(f"layer_types: {sorted(unknown)[0]!r} is not supported")
    has_window = features.has_window or (
        features.has_switched_window and raw.flag("use_sliding_window")
    )
    if not has_window or raw.get("sliding_window", _DEFAULT_WINDOW) is None:
        return (None,) * layers
    window = raw.count("sliding_window", _DEFAULT_WINDOW)
    if features.has_window:
        if "full_attention" in (kinds or ()):
            raise UnsupportedModelError(f"layer_types: {kinds!r} in {architecture}")
        return (window,) * layers
    if kinds is None:
        full = raw.get("max_window_layers", _DEFAULT_FULL_LAYERS)
        if isinstance(full, bool) or not isinstance(full, int) or full < 0:
            raise UnsupportedModelError(f"max_window_layers: {full!r} is not a number of layers")
        return tuple(None if i < full else window for i in range(layers))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _eos_token_ids(directory: Path, raw: _Keys) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    eos = _read_json(path).get("eos_token_id") if path.exists() else None
    if eos is None:
        eos = raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UnsupportedModelError(f"eos_token_id: {eos!r} is not one or more token ids")
    return tuple(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path.name}: {error}") from error
    if not isinstance(data, dict):
        raise UnsupportedModelError(f"{path.name}: not a JSON object")
    return data
