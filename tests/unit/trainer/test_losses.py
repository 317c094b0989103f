"""Losses against whole distributions, written out."""

from __future__ import annotations

import torch
from hypothesis import given, settings
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


@settings(deadline=None)
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


@settings(deadline=None)
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


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, VOCAB))
def test_reverse_kl_and_lk_are_those_of_the_coarse_distributions(seed: int, count: int) -> None:
    p_NV, logits_NV = pair(seed)
    target = named(p_NV, count)
    if count == VOCAB:
        p, q = p_NV, logits_NV.softmax(-1)
    else:
        p, q = coarse(p_NV, target), coarse(logits_NV.softmax(-1), target)
    reverse = (q * (q / p).log()).sum(-1)
    torch.testing.assert_close(
        LOSSES["reverse-kl"](logits_NV, target), reverse, rtol=1e-3, atol=2e-4
    )
    accepted = torch.minimum(p, q).sum(-1)
    share = (-3 * accepted).exp()
    expected = share * (p * (p / q).log()).sum(-1) + (1 - share) * (1 - accepted)
    torch.testing.assert_close(LOSSES["lk"](logits_NV, target), expected, rtol=1e-3, atol=2e-4)


def test_the_share_of_lk_has_no_gradient() -> None:
    p_NV, logits_NV = pair(8)
    target = named(p_NV, VOCAB)
    logits_NV.requires_grad_()
    (found,) = torch.autograd.grad(LOSSES["lk"](logits_NV, target).sum(), logits_NV)
    accepted = torch.minimum(p_NV, logits_NV.detach().softmax(-1)).sum(-1, keepdim=True)
    (kl,) = torch.autograd.grad(LOSSES["forward-kl"](logits_NV, target).sum(), logits_NV)
    (tv,) = torch.autograd.grad(LOSSES["total-variation"](logits_NV, target).sum(), logits_NV)
    share = (-3 * accepted).exp()
    torch.testing.assert_close(found, share * kl + (1 - share) * tv)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1.0, 30.0, 300.0]))
def test_gradients_are_finite_however_sure_the_draft_is(seed: int, scale: float) -> None:
    p_NV, logits_NV = pair(seed)
    p_NV = (p_NV.log() * scale).softmax(-1)
    for count in (1, 3, VOCAB):
        target = named(p_NV, count)
        for name, loss in LOSSES.items():
            logits = (logits_NV * scale).requires_grad_()
            value = loss(logits, target)
            (gradient,) = torch.autograd.grad(value.sum(), logits)
            assert value.isfinite().all(), name
            assert gradient.isfinite().all(), name
