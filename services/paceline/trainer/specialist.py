"""Makes a draft for one domain out of one that everybody uses, in micro-steps like the learner's.

A specialist is a checkpoint plus low-rank differences (low_rank.py) that learn from one domain's
samples for so many optimiser steps, at a rate that rises and falls with them. It is written as
their sum: what drafts needs full weights, and a sum has no base that could get lost. It lives in
memory only; one that was lost with its process is asked for again. learner_process.py gives it
turns.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.nn.utils import parametrize

from paceline.engine.models.config import load_model_config
from paceline.trainer.checkpoint import load_draft, save_draft
from paceline.trainer.learner_options import LearnerOptions
from paceline.trainer.losses import LOSSES
from paceline.trainer.low_rank import merged, with_differences
from paceline.trainer.micro_batches import MicroBatches, Pace
from paceline.trainer.replay import ReplayBuffer
from paceline.trainer.sliced_adamw import SlicedAdamW
from paceline.trainer.texts import Text
from paceline.trainer.train import TrainPlan, rate_at

_MOST_PASSES = 4
"""Over what it has to learn from when it begins. With 20 passes over 43 samples the demo model's
draft lost 0.007 to 0.025 of its acceptance on held-out text of the domain itself."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be made."""

    base: Path
    """Checkpoint to start from."""
    domain: str
    rank: int
    num_steps: int
    """Of the optimiser; fewer where there is too little to learn from."""
    directory: Path
    """To make."""


class Specialist:
    """One on its way. Not for threads."""

    def __init__(
        self,
        order: Order,
        replay: ReplayBuffer,
        options: LearnerOptions,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Learn from what `replay` has of the domain, now and later, as the options say.

        Raises:
            UnsupportedModelError: the base cannot be trained.
            ValueError: a rank or number of steps below 1.
        """
        if order.rank < 1 or order.num_steps < 1:
            raise ValueError(f"rank {order.rank}, {order.num_steps} steps: expected at least 1")
        self.order = order
        self.num_steps = self.num_tokens = 0
        """So far: optimiser steps, and tokens learned from."""
        self.num_samples = replay.num_texts(order.domain)
        """To learn from when it began."""
        self._options = options
        self._monotonic = monotonic
        self._model = load_draft(order.base)
        differences = with_differences(self._model, order.rank, options.seed)
        self._optimiser = SlicedAdamW(differences, 0.0, options.max_grad_norm)
        self._loss = LOSSES[options.loss]
        texts = OneDomain(replay, order.domain, options.seed)
        passes = _MOST_PASSES * texts.num_tokens / options.batch_tokens
        self._most_steps = min(order.num_steps, max(1, round(passes)))
        self._batches = MicroBatches(texts, options.positions, 0.0)
        self._plan = TrainPlan(learning_rate=options.learning_rate)
        self._pace = Pace()
        self._num_batches = 0
        self._under_way: Iterator[None] | None = None
        """An optimiser step that was begun."""
        self._drop_gradient()

    @property
    def is_done(self) -> bool:
        """Whether it has learned for all of its steps."""
        return self.num_steps >= self._most_steps

    def micro_step(self, deadline_s: float) -> bool:
        """Learn for at most a micro-step, ending before the deadline of the clock.

        Returns whether anything was done; there may be no samples, or too little time.

        Raises:
            NotFiniteError: it went wrong, and is of no more use.
        """
        begun_s = self._monotonic()
        seconds = min(self._options.micro_step_s, deadline_s - begun_s)
        if seconds <= 0.0 or self.is_done:
            return False
        if self._under_way is not None:
            self._advance(begun_s + seconds)
            return True
        return self._accumulate(seconds, begun_s)

    def export(self) -> None:
        """Write it as a checkpoint of full weights.

        Raises:
            OSError, UnsupportedModelError: it cannot be written, and nothing was.
        """
        order = self.order
        card = {"base": order.base.name, "domain": order.domain, "rank": order.rank}
        save_draft(
            merged(self._model),
            order.base,
            load_model_config(order.base),
            order.directory,
            {"format": 1, "specialist": {**card, "num_steps": self.num_steps}},
        )

    def _accumulate(self, seconds: float, begun_s: float) -> bool:
        options = self._options
        num_tokens = options.micro_tokens or self._pace.tokens_for(seconds, options.batch_tokens)
        if num_tokens == 0:
            self._pace.hope()
            return False
        texts = self._batches.draw(num_tokens, options.seed + self._num_batches)
        if not texts:
            return False
        self._num_batches += 1
        # The sums are used more than once in a pass.
        with parametrize.cached():
            _, weight_sum = self._model.add_gradient(texts, self._loss)
        self._weight_sum += weight_sum
        num_learned = sum(len(text.tokens_T) for text in texts)
        self._batch_tokens += num_learned
        self.num_tokens += num_learned
        self._pace.note(num_learned, self._monotonic() - begun_s)
        if self._batch_tokens >= options.batch_tokens:
            progress = self.num_steps / self._most_steps
            rate = rate_at(self._plan, progress)
            self._under_way = self._optimiser.step(rate, 1.0 / self._weight_sum)
        return True

    def _advance(self, until_s: float) -> None:
        assert self._under_way is not None
        for _ in self._under_way:
            if self._monotonic() >= until_s:
                return
        self._under_way = None
        self.num_steps += 1
        self._drop_gradient()

    def _drop_gradient(self) -> None:
        self._optimiser.zero_grad()
        self._weight_sum, self._batch_tokens = 0.0, 0


class OneDomain:
    """The texts of one domain, every one with the same probability."""

    def __init__(self, replay: ReplayBuffer, domain: str, seed: int) -> None:
        self._replay, self._domain = replay, domain
        self._chance = random.Random(seed)

    @property
    def num_tokens(self) -> int:
        """Of the texts to learn from."""
        count = self._replay.num_texts(self._domain)
        texts = (self._replay.text_at(self._domain, i) for i in range(count))
        return sum(len(text.tokens_T) for text in texts)

    def draw(self, recent_ratio: float) -> Text | None:
        """Return a text to learn from; None if there is none. Recent ones count like all."""
        count = self._replay.num_texts(self._domain)
        if not count:
            return None
        return self._replay.text_at(self._domain, self._chance.randrange(count))
