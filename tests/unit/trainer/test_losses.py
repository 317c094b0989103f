"""Losses against whole distributions, written out."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.trainer.losses import LOSSES, TargetProbs

VOCAB = 11


def pair(seed: int, num_rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p_NV, logits_NV = torch.randn(2, num_rows, VOCAB, generator=generator) * 2
    return p_NV.softmax(-1), logits_NV


def named(p_NV: torch.Tensor, count: int) -> TargetProbs:
    probs_NK, ids_NK = p_NV.topk(count)
    return TargetProbs(ids_NK, probs_NK, ids_NK[:, -1])


def coarse(x_NV: torch.Tensor, target: TargetProbs) -> torch.Tensor:
    """The named tokens, and all others as one."""
    kept_NK = x_NV.gather(-1, target.token_ids_NK)
    return torch.cat((kept_NK, 1 - kept_NK.sum(-1, keepdim=True)), -1)


@given(seed=st.integers(0, 10_000), count=st.integers(1, VOCAB - 1))
def test_divergences_are_those_of_the_coarse_distributions(seed: int, count: int) -> None:
    p_NV, logits_NV = pair(seed)
    target = named(p_NV, count)
    p, q = coarse(p_NV, target), coarse(logits_NV.softmax(-1), target)
    kl = (p * (p / q).log()).sum(-1)
    entropy = -(p * p.log()).sum(-1)
    torch.testing.assert_close(
        LOSSES["forward-kl"](logits_NV, target), kl + entropy, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        LOSSES["total-variation"](logits_NV, target), 0.5 * (p - q).abs().sum(-1), atol=1e-5, rtol=0
    )


@given(seed=st.integers(0, 10_000))
def test_with_every_token_named_nothing_is_lost(seed: int) -> None:
    p_NV, logits_NV = pair(seed)
    target, q_NV = named(p_NV, VOCAB), logits_NV.softmax(-1)
    refused = 1 - torch.minimum(p_NV, q_NV).sum(-1)
    torch.testing.assert_close(
        LOSSES["total-variation"](logits_NV, target), refused, atol=1e-5, rtol=0
    )
    expected = -(p_NV * q_NV.log()).sum(-1)
    torch.testing.assert_close(
        LOSSES["forward-kl"](logits_NV, target), expected, rtol=1e-4, atol=1e-4
    )


def test_the_target_itself_is_the_best_draft() -> None:
    p_NV, _ = pair(3)
    target = named(p_NV, 4)
    for name in ("forward-kl", "total-variation"):
        logits_NV = p_NV.log().clone().requires_grad_()
        LOSSES[name](logits_NV, target).sum().backward()
        assert logits_NV.grad is not None
        if name == "forward-kl":
            assert logits_NV.grad.abs().max() < 1e-5
        worse = LOSSES[name](p_NV.log() + torch.randn_like(p_NV), target)
        assert (worse >= LOSSES[name](p_NV.log(), target)).all()


def test_cross_entropy_is_of_the_token_that_followed() -> None:
    p_NV, logits_NV = pair(4)
    target = named(p_NV, 3)
    rows = torch.arange(len(p_NV))
    expected = -logits_NV.log_softmax(-1)[rows, target.drawn_N]
    torch.testing.assert_close(LOSSES["cross-entropy"](logits_NV, target), expected)
