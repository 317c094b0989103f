"""A target small enough to make drafts of within seconds, tokenizer and chat template included."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.unit.gateway.tokenizers_made import byte_level

TEMPLATE = "{% for m in messages %}U:{{ m['content'] }}{% endfor %}A:"


def tiny_target(directory: Path) -> Path:
    """Write the checkpoint; its distribution depends on the last token most."""
    tokenizer = byte_level()
    eos = tokenizer.token_to_id("<|eos|>")
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=eos,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.1)
        # What all tokens have in common makes some successors likely behind every token.
        model.model.embed_tokens.weight.add_(0.2 * torch.randn(64))
        model.lm_head.weight.mul_(2)
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|eos|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory
