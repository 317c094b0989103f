"""What every draft that learns has in common: it guesses tokens along texts.

A small model guesses the next token at every position, Medusa heads those some tokens later.
decoder.py and heads.py are such drafts; learner.py trains them, judging.py and chains.py score
them, and none of these needs to know which it has.

Shape legend: N guesses, V vocabulary, R roots, D depths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from paceline.trainer.losses import Loss, TargetProbs
from paceline.trainer.sliced_adamw import NotFiniteError
from paceline.trainer.texts import Text


@dataclass(frozen=True, slots=True, eq=False)
class Guesses:
    """Guesses of some tokens of texts, and what the target says of each."""

    logits_NV: torch.Tensor
    """With a gradient to the draft's weights."""
    target: TargetProbs
    weights_N: torch.Tensor
    """How much each counts in a loss."""


class GuessingModel(nn.Module, ABC):
    """A draft in training."""

    @property
    def num_weights(self) -> int:
        """Numbers that are learned."""
        return sum(parameter.numel() for parameter in self.parameters())

    @abstractmethod
    def guesses(self, texts: Sequence[Text]) -> Iterator[Guesses]:
        """Yield the guesses at all positions of texts that count, none twice.

        In parts, so that logits of one part are in memory at a time.
        """

    def add_gradient(self, texts: Sequence[Text], loss: Loss) -> tuple[float, float]:
        """Add the gradient of a loss along texts; return the sums of the loss and of its weights.

        Raises:
            NotFiniteError: a loss is not finite; what was added is of no use.
        """
        loss_sum = weight_sum = 0.0
        for guesses in self.guesses(texts):
            loss_N = loss(guesses.logits_NV, guesses.target)
            part = (loss_N * guesses.weights_N).sum()
            value = float(part.detach())
            if not abs(value) < float("inf"):
                raise NotFiniteError("a loss that is not finite")
            part.backward()
            loss_sum += value
            weight_sum += float(guesses.weights_N.sum())
        return loss_sum, weight_sum

    @abstractmethod
    def chain_matches(self, text: Text, depth: int) -> torch.Tensor:
        """Tell which tokens of chains are those of the text, bool [R, D].

        A chain holds the draft's likeliest tokens, each behind the text's own ones: a root that the
        target drew with the state behind a captured position, then D = `depth` drafted tokens.
        Every captured token with D more behind it is the root of one.
        """
