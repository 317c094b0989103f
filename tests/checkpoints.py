"""Small random checkpoints of every served architecture, written by transformers itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

DEMO = Path(__file__).parent.parent / "models" / "demo"

_BASE = dict(
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.3,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, dict(tie_word_embeddings=True)),
    "llama-biased-llama3-rope": (
        LlamaConfig,
        LlamaForCausalLM,
        dict(attention_bias=True, mlp_bias=True, rope_parameters=_LLAMA3, head_dim=24),
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict()),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=32)),
    "mistral": (MistralConfig, MistralForCausalLM, dict(sliding_window=24)),
}

VARIANTS = {
    "llama-linear-rope": (
        LlamaConfig,
        LlamaForCausalLM,
        dict(rope_parameters=dict(rope_type="linear", rope_theta=50000.0, factor=4.0)),
    ),
    "mistral-unwindowed": (MistralConfig, MistralForCausalLM, dict(sliding_window=None)),
    "qwen2-partly-windowed": (
        Qwen2Config,
        Qwen2ForCausalLM,
        dict(use_sliding_window=True, sliding_window=24, max_window_layers=1),
    ),
    "qwen3-biased-tied": (
        Qwen3Config,
        Qwen3ForCausalLM,
        dict(head_dim=16, attention_bias=True, tie_word_embeddings=True),
    ),
}
"""What the same architectures can also be."""


def random_checkpoint(
    architecture: str, directory: Path, seed: int = 0, **overrides: object
) -> Path:
    """Write a random checkpoint with the demo model's tokenizer and return its directory."""
    config_class, model_class, extra = {**ARCHITECTURES, **VARIANTS}[architecture]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**_BASE, **extra, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, directory / name)
    return directory
