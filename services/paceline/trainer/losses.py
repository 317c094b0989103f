"""What a draft is trained to: the target's distribution over the next token.

The target's distribution is known by its K likeliest tokens and the mass of all others, which is
what generation and verification leave behind at no cost. Losses are per position; train.py
weighs and averages them. A new loss is one function and one line in the table.

Shape legend: N positions, K named tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

_LEAST = 1e-6
"""Below this a mass counts as none; keeps logarithms finite."""

_LK_DECAY = 3.0
"""How fast the share of KL falls with acceptance; the paper's choice."""


@dataclass(frozen=True, slots=True, eq=False)
class TargetProbs:
    """The target's distribution at N positions."""

    token_ids_NK: torch.Tensor
    """int64; distinct within a row."""
    probs_NK: torch.Tensor
    """float32, of the tokens named; a row may sum to less than 1, the rest is the tail."""
    drawn_N: torch.Tensor
    """int64; the token that followed."""

    @property
    def tail_N(self) -> torch.Tensor:
        """Mass of the tokens that are not named."""
        return (1.0 - self.probs_NK.sum(-1)).clamp_min(0.0)


Loss = Callable[[torch.Tensor, TargetProbs], torch.Tensor]
"""Draft logits [N, V] and what the target says, to a loss for each position, [N]."""


def forward_kl(logits_NV: torch.Tensor, target: TargetProbs) -> torch.Tensor:
    """KL(p || q) without p's own entropy; the tail is one event (Hinton et al. 2015)."""
    log_q_NV = logits_NV.log_softmax(-1)
    log_q_NK = log_q_NV.gather(-1, target.token_ids_NK)
    named_N = (target.probs_NK * log_q_NK).sum(-1)
    rest_N = (1.0 - log_q_NK.exp().sum(-1)).clamp_min(_LEAST)
    return -named_N - target.tail_N * rest_N.log()


def cross_entropy(logits_NV: torch.Tensor, target: TargetProbs) -> torch.Tensor:
    """Log-loss of the token that followed; needs no distribution."""
    return torch.nn.functional.cross_entropy(logits_NV, target.drawn_N, reduction="none")


def total_variation(logits_NV: torch.Tensor, target: TargetProbs) -> torch.Tensor:
    """1 - sum_x min(p, q): the share of draft tokens that verification refuses.

    Leviathan et al. 2023, theorem 3.5. The tail is one event, so this is a lower bound.
    """
    q_NK = logits_NV.softmax(-1).gather(-1, target.token_ids_NK)
    named_N = torch.minimum(target.probs_NK, q_NK).sum(-1)
    return 1.0 - named_N - torch.minimum(target.tail_N, 1.0 - q_NK.sum(-1))


def reverse_kl(logits_NV: torch.Tensor, target: TargetProbs) -> torch.Tensor:
    """KL(q || p), the tail as one event: mass where the target has little costs most.

    What the target gives no mass counts as if it gave 1e-6, which bounds the loss.
    """
    log_q_NK = logits_NV.log_softmax(-1).gather(-1, target.token_ids_NK)
    q_NK = log_q_NK.exp()
    named_N = (q_NK * (log_q_NK - target.probs_NK.clamp_min(_LEAST).log())).sum(-1)
    rest_N = (1.0 - q_NK.sum(-1)).clamp_min(_LEAST)
    return named_N + rest_N * (rest_N.log() - target.tail_N.clamp_min(_LEAST).log())


def lk(logits_NV: torch.Tensor, target: TargetProbs) -> torch.Tensor:
    """KL(p || q) where little is accepted, the refused share itself where much is.

    The hybrid of "LK losses" (arXiv 2602.23881): lambda KL + (1 - lambda) (1 - a) with
    lambda = exp(-3 a) for the acceptance a of the position, which gets no gradient through lambda.
    KL shows the way where total variation is flat; total variation is what counts in the end.
    """
    refused_N = total_variation(logits_NV, target)
    lambda_N = (_LK_DECAY * (refused_N.detach() - 1.0)).exp()
    kl_N = forward_kl(logits_NV, target) - _entropy(target)
    return lambda_N * kl_N + (1.0 - lambda_N) * refused_N


def _entropy(target: TargetProbs) -> torch.Tensor:
    """Entropy of the target's named tokens and its tail as one event, [N]."""
    entropy_N: torch.Tensor = torch.special.entr(target.probs_NK).sum(-1)
    entropy_N += torch.special.entr(target.tail_N)
    return entropy_N


LOSSES: dict[str, Loss] = {
    "forward-kl": forward_kl,
    "cross-entropy": cross_entropy,
    "total-variation": total_variation,
    "reverse-kl": reverse_kl,
    "lk": lk,
}
