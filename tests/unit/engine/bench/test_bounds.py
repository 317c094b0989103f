"""Bounds for a shape whose arithmetic can be done by hand, and reports that follow them."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from paceline.engine.bench.bounds import (
    ModelSize,
    decode_bound_tok_s,
    model_size,
    prefill_bound_tok_s,
)
from paceline.engine.bench.machine import MachineRates
from paceline.engine.models.config import load_model_config
from tests.checkpoints import DEMO

SIZE = ModelSize(num_linear=90, num_head=10, num_layers=2, q_size=8, kv_size=4)
RATES = MachineRates(1e-6, 2e-6, {"f32": 1e-6, "bf16": 4e-6, "int8": 8e-6})
"""2,000 bytes and, in f32, 1,000 operations a second."""


def test_one_request_decodes_as_fast_as_the_weights_are_read() -> None:
    # 100 weights and 2 * 2 * 4 entries of KV per token of context, 4 bytes each.
    bytes_read = 4 * 100 + 4 * 16 * 5
    bound = decode_bound_tok_s(SIZE, RATES, "f32", context=5, concurrency=1)
    flops = 2 * 100 + 4 * 2 * 8 * 5
    assert bound == pytest.approx(1 / max(bytes_read / 2000, flops / 1000))
    halved = decode_bound_tok_s(SIZE, RATES, "bf16", context=5, concurrency=1)
    assert halved == pytest.approx(1 / (bytes_read / 2 / 2000))


def test_many_requests_decode_as_fast_as_they_are_computed() -> None:
    bound = decode_bound_tok_s(SIZE, RATES, "f32", context=0, concurrency=1000)
    assert bound == pytest.approx(1000 / (2 * 100))


def test_prefill_computes_the_head_once_per_prompt() -> None:
    flops = 2 * 90 * 10 + 2 * 10 + 4 * 2 * 8 * 10 * 10 / 2
    bound = prefill_bound_tok_s(SIZE, RATES, "f32", prompt_len=10)
    assert bound == pytest.approx(10 / (flops / 1000))


def test_the_size_is_that_of_the_checkpoint() -> None:
    config = load_model_config(DEMO)
    size = model_size(config)
    norms = (2 * config.num_layers + 1) * config.hidden_size
    with safe_open(DEMO / "model.safetensors", framework="pt") as file:
        num_stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert config.tie_embeddings
    assert size.num_linear + size.num_head + norms == num_stored
