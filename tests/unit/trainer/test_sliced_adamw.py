"""The sliced optimiser takes the steps of torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paceline.trainer import sliced_adamw
from paceline.trainer.sliced_adamw import NotFiniteError, SlicedAdamW


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 11), nn.RMSNorm(11), nn.Linear(11, 5))


@pytest.mark.parametrize("slice_elements", [5, 1 << 18])
def test_steps_are_those_of_torch(slice_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced_adamw, "_SLICE_ELEMENTS", slice_elements)
    mine, other = network(), network()
    optimiser = SlicedAdamW(mine, weight_decay=0.1, max_grad_norm=0.5)
    matrices = [p for p in other.parameters() if p.dim() > 1]
    vectors = [p for p in other.parameters() if p.dim() == 1]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    for i in range(12):
        x = torch.randn(9, 7)
        rate = 0.01 * (1 + i % 3)
        for model in (mine, other):
            model.zero_grad()
            model(x).square().sum().backward()
        slices = sum(1 for _ in optimiser.step(rate, 1 / 9))
        assert slices > 30 if slice_elements == 5 else slices == 10
        for p in other.parameters():
            assert p.grad is not None
            p.grad /= 9
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
    for p, q in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = network()
    optimiser = SlicedAdamW(model, weight_decay=0.1, max_grad_norm=1.0)
    model(torch.randn(2, 7)).sum().backward()
    model[0].weight.grad[3, 3] = float("nan")  # type: ignore[union-attr,index,operator]
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NotFiniteError):
        list(optimiser.step(0.1, 1.0))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_restored_optimiser_goes_on_as_if_it_had_not_ended() -> None:
    one, two = network(), network()
    first, second = (SlicedAdamW(m, weight_decay=0.0, max_grad_norm=1.0) for m in (one, two))
    inputs = torch.randn(6, 4, 7)
    for i, x in enumerate(inputs):
        if i == 3:
            arrays, num_steps = first.state()
            second.restore({n: a.clone() for n, a in arrays.items()}, num_steps)
            two.load_state_dict(one.state_dict())
        for model, optimiser in ((one, first), (two, second)):
            if model is two and i < 3:
                continue
            optimiser.zero_grad()
            model(x).square().sum().backward()
            list(optimiser.step(0.01, 1.0))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
