"""Without C++ kernels, the batch-invariant mode computes a row as if it were alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from paceline.engine import kernels
from paceline.engine.kernels import AttentionBatch
from paceline.engine.models.config import load_model_config
from paceline.engine.models.load import Model, ModelOptions, load_model
from tests.checkpoints import DEMO

BLOCK, WIDTH = 16, 4
LENGTHS = [37, 5, 1, 64]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(kernels, "has_cpp_kernels", lambda: False)
    options = ModelOptions("f32", BLOCK, WIDTH * BLOCK, threads=1, batch_invariant=True)
    return load_model(DEMO, load_model_config(DEMO), options)


def compute(
    model: Model, rows: list[int], tails: list[list[int]] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return residuals of all tokens of some of the rows, and logits of their last tokens.

    `tails` are the parents of the rows' last tokens; positions are left as they are.
    """
    c = model.config
    lengths = [LENGTHS[r] for r in rows]
    cu_q = torch.tensor([0, *lengths]).cumsum(0)
    kv = torch.zeros(len(LENGTHS) * WIDTH, c.num_layers, 2, c.num_kv_heads, BLOCK, c.head_dim)
    positions = torch.cat([torch.arange(n) for n in lengths])
    owners = torch.tensor(rows).repeat_interleave(torch.tensor(lengths))
    batch = AttentionBatch(
        cu_q=cu_q.int(),
        kv_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=torch.tensor([[r * WIDTH + i for i in range(WIDTH)] for r in rows]).int(),
        block_size=BLOCK,
        max_q=max(lengths),
    )
    if tails is not None:
        parents = [tails[r] for r in rows]
        batch = replace(
            batch,
            cu_tree=torch.tensor([0, *map(len, parents)]).cumsum(0).int(),
            tree_parents=torch.tensor([p for tail in parents for p in tail]).int(),
        )
    with torch.inference_mode():
        residuals = model.forward(
            5 + 3 * positions + owners, positions, kv, owners * WIDTH * BLOCK + positions, batch
        )
        return residuals, model.logits(residuals, cu_q[1:] - 1)


def test_a_row_is_the_same_in_any_batch(model: Model) -> None:
    rows = list(range(len(LENGTHS)))
    residuals, logits = compute(model, rows)
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    for row, (begin, end) in enumerate(pairwise(bounds)):
        alone, logits_alone = compute(model, [row])
        assert torch.equal(alone, residuals[begin:end])
        assert torch.equal(logits_alone[0], logits[row])


def test_a_row_keeps_its_tree(model: Model) -> None:
    rows = list(range(len(LENGTHS)))
    # Of whole rows, for a step's tokens are all in the tail.
    tails = [[max(-1, i - 1 - i % 3) for i in range(37)], [-1, 0, 0, 1, 2], [], [-1] * 64]
    residuals, _ = compute(model, rows, tails)
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    plain, _ = compute(model, rows)
    for row, (begin, end) in enumerate(pairwise(bounds)):
        assert torch.equal(compute(model, [row], tails)[0], residuals[begin:end])
        assert torch.equal(plain[begin:end], residuals[begin:end]) == (not tails[row])
