"""Configurations are read as transformers reads them, or refused by the name of the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from paceline.engine.models.config import (
    ModelConfig,
    UnsupportedModelError,
    load_model_config,
    rope_table,
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
CLASSES = {
    "LlamaForCausalLM": LlamaConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
    "MistralForCausalLM": MistralConfig,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def load(directory: Path, **changes: Any) -> ModelConfig:
    """Read a Llama configuration with changes; a key set to ... is left out."""
    raw = {k: v for k, v in {**LLAMA, **changes}.items() if v is not ...}
    (directory / "config.json").write_text(json.dumps(raw))
    return load_model_config(directory)


def transformers_config(directory: Path) -> PreTrainedConfig:
    raw = json.loads((directory / "config.json").read_text())
    return CLASSES[raw.pop("architectures")[0]](**raw)


def windows_of(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The window of each layer as transformers' models apply it."""
    layers = config.num_hidden_layers
    if isinstance(config, MistralConfig):
        return (config.sliding_window,) * layers
    if isinstance(config, LlamaConfig):
        return (None,) * layers
    kinds = config.layer_types
    return tuple(config.sliding_window if k == "sliding_attention" else None for k in kinds)


# -- what is read -------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(CLASSES))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 32},
        {"sliding_window": None},
        {"sliding_window": 32, "use_sliding_window": False},
        {"sliding_window": 32, "use_sliding_window": True},
        {"sliding_window": None, "use_sliding_window": True},
        {"use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3},
        {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 99},
        {"sliding_window": 32, "use_sliding_window": True, "num_hidden_layers": 30},
    ],
    ids=str,
)
def test_windows_are_those_of_transformers(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    config = load(tmp_path, architectures=[architecture], **changes)
    assert config.windows == windows_of(transformers_config(tmp_path))


@pytest.mark.parametrize("use", [True, False])
def test_layer_types_decide_where_the_window_is(tmp_path: Path, use: bool) -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    config = load(
        tmp_path,
        architectures=["Qwen2ForCausalLM"],
        sliding_window=32,
        use_sliding_window=use,
        layer_types=kinds,
    )
    assert config.windows == ((None, 32, None, 32) if use else (None,) * 4)
    if use:
        assert config.windows == windows_of(transformers_config(tmp_path))


@pytest.mark.parametrize("architecture", sorted(CLASSES))
@pytest.mark.parametrize("lost", ["num_key_value_heads", "head_dim", "rms_norm_eps"])
@pytest.mark.parametrize("value", [..., None])
def test_lost_keys_mean_what_they_mean_to_transformers(
    tmp_path: Path, architecture: str, lost: str, value: Any
) -> None:
    heads = {"num_attention_heads": 32, "hidden_size": 512}
    changes = {"head_dim": ..., **heads, lost: value}
    if lost in ("num_key_value_heads", "head_dim") and value is None:
        # Not all of transformers' classes take a null; it always means "derived".
        config = load(tmp_path, architectures=[architecture], **changes)
        assert lost != "head_dim" or config.head_dim == 16
        assert lost == "head_dim" or config.num_kv_heads == 32
        return
    if lost == "rms_norm_eps" and value is None:
        with pytest.raises(UnsupportedModelError, match="rms_norm_eps"):
            load(tmp_path, architectures=[architecture], **changes)
        return
    config = load(tmp_path, architectures=[architecture], **changes)
    theirs = CLASSES[architecture](
        **{k: v for k, v in {**LLAMA, **changes}.items() if v is not ... and k != "architectures"}
    )
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 512 // 32)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", (True, True, True)),
        ("Qwen2ForCausalLM", (True, False, False)),
        ("Qwen3ForCausalLM", (True, True, False)),
        ("MistralForCausalLM", (False, False, False)),
    ],
)
def test_biases_are_where_the_architecture_has_them(
    tmp_path: Path, architecture: str, expected: tuple[bool, bool, bool]
) -> None:
    changes = {"architectures": [architecture], "attention_bias": True, "mlp_bias": True}
    config = load(tmp_path, **changes)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == expected


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 500_000.0},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 7e4, "factor": 2.0}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {
            "rope_parameters": {
                k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"
            }
        },
    ],
    ids=str,
)
def test_rotary_tables_equal_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = load(tmp_path, **rope)
    ours = rope_table(config, config.max_context_tokens)
    positions = torch.arange(config.max_context_tokens)[None]
    cos, sin = LlamaRotaryEmbedding(transformers_config(tmp_path))(torch.zeros(1), positions)
    torch.testing.assert_close(ours[:, 0], cos[0], rtol=0, atol=0)
    torch.testing.assert_close(ours[:, 1], sin[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (..., ..., ()),
        (None, ..., ()),
        (2, ..., (2,)),
        ([2, 3], ..., (2, 3)),
        (2, [5, 6], (5, 6)),
        (2, None, (2,)),
        (..., 4, (4,)),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(
    tmp_path: Path, in_config: Any, in_generation: Any, expected: tuple[int, ...]
) -> None:
    if in_generation is not ...:
        text = json.dumps({"eos_token_id": in_generation})
        (tmp_path / "generation_config.json").write_text(text)
    assert load(tmp_path, eos_token_id=in_config).eos_token_ids == expected


# -- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", [..., None, "64", 0, -1, 1.5, True, [64]], ids=repr)
def test_a_missing_or_odd_size_is_named(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        load(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": ...}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"architectures": {"a": 1}}, "architectures"),
        ({"architectures": [["x"]]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type.*yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type.*dynamic"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_type.*longrope"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type.*proportional"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_scaling": "linear"}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": "1"}}, "low_freq_factor"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        (
            {"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 4},
            "layer_types",
        ),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "max_window_layers": None,
            },
            "max_window_layers",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": "4k"},
            "sliding_window",
        ),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        load(tmp_path, **changes)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"'])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        load_model_config(tmp_path)


def test_a_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        load_model_config(tmp_path / "nowhere")
