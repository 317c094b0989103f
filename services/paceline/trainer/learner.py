"""Learns from live traffic in micro-steps: a draft of any kind, its optimiser, what it has seen.

A micro-step is one forward and backward over a few texts, or a part of an optimiser step; each
lasts as long as it was given, so whoever holds this can stop between two (learner_process.py).
Gradients add up until `batch_tokens`, then one step is taken (sliced_adamw.py). guard.py brings
good weights back when learning goes wrong.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from paceline.domain.learnings import Sample
from paceline.engine.models.config import UnsupportedModelError
from paceline.trainer.counters import Counters
from paceline.trainer.domains import Domains
from paceline.trainer.first_sight import FirstSight, Pair
from paceline.trainer.guard import Guard
from paceline.trainer.guessing import GuessingModel
from paceline.trainer.judging import judge
from paceline.trainer.learnables import LEARNABLES
from paceline.trainer.learner_options import LearnerOptions
from paceline.trainer.losses import LOSSES
from paceline.trainer.micro_batches import MicroBatches, Pace
from paceline.trainer.replay import OTHER, ReplayBuffer
from paceline.trainer.sliced_adamw import NotFiniteError, SlicedAdamW
from paceline.trainer.texts import Text

logger = logging.getLogger(__name__)

_MAX_COUNTED = 128
"""Domains that are counted apart; those of the replay buffer come and go."""
_RESTORED_RATE = 0.5
"""Of the learning rate, after good weights had to be brought back."""
_LEAST_RATE = 1 / 16
"""Of the learning rate, however often that happens."""
_JUDGED_TEXTS = 48
"""New texts that tell whether learning helps."""
_MAX_LOSS, _MUCH_GAINED = 0.005, 0.03
"""Of acceptance on them."""


class OnlineLearner:
    """One draft that learns. Not for threads."""

    def __init__(
        self, options: LearnerOptions, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Start from the options' draft.

        Raises:
            UnsupportedModelError: it cannot be trained.
            KeyError: there is no such drafter, loss or choice of positions.
        """
        self.options = options
        self.counters = Counters()
        self._learnable = LEARNABLES[options.drafter](options)
        self.model: GuessingModel = self._learnable.model
        self.replay = ReplayBuffer(
            options.replay_bytes, seed=options.seed, held_out_every=options.held_out_every
        )
        self.first_sight = FirstSight(Path(options.draft), self._learnable.load)
        self._monotonic = monotonic
        self._loss = LOSSES[options.loss]
        self._domains = Domains()
        self._batches = MicroBatches(
            self.replay, options.positions, options.recent_ratio, self._learnable.lesson
        )
        self._optimiser = SlicedAdamW(self.model, options.weight_decay, options.max_grad_norm)
        self._guard = Guard(self.model, options.spike_ratio, options.spike_steps)
        self._pace = Pace()
        self._under_way: Iterator[None] | None = None
        """An optimiser step that was begun."""
        self._tokens_left = 0.0
        """That may be learned before new ones come."""
        self._texts_since_adapted = 0
        self._drop_gradient()

    # -- traffic --------------------------------------------------------------------------

    def feed(self, sample: Sample) -> None:
        """Take a sample in; one that lacks what this draft learns from is counted and left out.

        Raises:
            ValueError: it is corrupt, and counted; says how.
        """
        try:
            text = self.text(sample)
        except ValueError:
            self.counters.num_corrupt += 1
            raise
        if text is None:
            if not self.counters.num_left_out:
                fields = {"drafter": self.options.drafter}
                logger.warning("sample-without-hidden-states", extra={"fields": fields})
            self.counters.num_left_out += 1
            return
        if not text.domain:
            text = replace(text, domain=self._domains.name(sample))
        if self.replay.is_held_out(text):
            self.replay.add(text)
        elif not (self.options.judges_first and self.options.draft):
            # New heads come from no checkpoint that they could be compared with.
            self._release(text)
        else:
            unjudged = self.first_sight.add(text)
            if unjudged is not None:
                self._release(unjudged)
        self.counters.num_samples += 1
        # As the buffer does: labels are the clients' choice, so their number is bounded.
        by_domain, domain = self.counters.samples_by_domain, self.replay.shelf_of(text.domain)
        if domain not in by_domain and len(by_domain) >= _MAX_COUNTED:
            domain = OTHER
        by_domain[domain] = by_domain.get(domain, 0) + 1

    def text(self, sample: Sample) -> Text | None:
        """Return a sample as this draft learns from it; None if it lacks what that needs.

        Raises:
            ValueError: it is corrupt; says how.
        """
        return self._learnable.text(sample)

    def _release(self, text: Text) -> None:
        """Let a text be learned from."""
        self.replay.add(text)
        self._tokens_left += self.options.max_passes * len(text.tokens_T)

    # -- learning -------------------------------------------------------------------------

    def micro_step(self, deadline_s: float) -> bool:
        """Learn for at most `micro_step_s`, ending before the deadline of the clock.

        Returns whether anything was done; there may be no samples, or too little time.
        """
        begun_s = self._monotonic()
        seconds = min(self.options.micro_step_s, deadline_s - begun_s)
        if seconds <= 0.0:
            return False
        if self._under_way is not None:
            self._advance(begun_s + seconds)
        elif self.first_sight.has_waiting:
            self._release(self.first_sight.judge_next(self.model))
            self._adapt()
        elif not self._accumulate(seconds, begun_s):
            return False
        took_s = self._monotonic() - begun_s
        self.counters.num_micro_steps += 1
        self.counters.trained_s += took_s
        self.counters.last_micro_step_s = took_s
        return True

    def settle(self) -> None:
        """End an optimiser step that was begun, so that the weights can be read."""
        if self._under_way is not None:
            self._advance(float("inf"))

    def _accumulate(self, seconds: float, begun_s: float) -> bool:
        options = self.options
        if self._tokens_left <= 0.0:
            return False
        num_tokens = options.micro_tokens or self._pace.tokens_for(seconds, options.batch_tokens)
        if num_tokens == 0:
            self._pace.hope()
            return False
        texts = self._batches.draw(num_tokens, options.seed + self.counters.num_micro_steps)
        if not texts:
            return False
        num_tokens = sum(len(text.tokens_T) for text in texts)
        self._learn(texts, num_tokens)
        if options.micro_tokens is None:
            self._pace.note(num_tokens, self._monotonic() - begun_s)
        if self._batch_tokens >= options.batch_tokens:
            self._under_way = self._step()
        return True

    def _learn(self, texts: Sequence[Text], num_tokens: int) -> None:
        self.counters.num_tokens += num_tokens
        self._tokens_left -= num_tokens
        try:
            loss_sum, weight_sum = self.model.add_gradient(texts, self._loss)
        except NotFiniteError:
            self._skip("loss-not-finite")
            return
        self._loss_sum += loss_sum
        self._weight_sum += weight_sum
        self._batch_tokens += num_tokens

    def _advance(self, until_s: float) -> None:
        assert self._under_way is not None
        try:
            for _ in self._under_way:
                if self._monotonic() >= until_s:
                    return
        except NotFiniteError:
            self._skip("gradient-not-finite")
        self._under_way = None

    def _step(self) -> Iterator[None]:
        counters, options = self.counters, self.options
        loss = self._loss_sum / self._weight_sum
        if self._guard.note(loss):
            self._restore("loss-spike", loss)
            return
        rise = min(1.0, (counters.steps_since_reset + 1) / max(1, options.warm_up_steps))
        rate = options.learning_rate * counters.rate_ratio * rise
        yield from self._optimiser.step(rate, 1.0 / self._weight_sum)
        counters.num_steps += 1
        counters.steps_since_reset += 1
        counters.last_loss = loss
        self._drop_gradient()
        if counters.num_steps % options.snapshot_steps == 0:
            if not self._guard.is_sound():
                self._restore("weights-not-finite", loss)
                return
            yield from self._guard.keep()

    def _skip(self, reason: str) -> None:
        """Drop a batch; if the weights are to blame, bring good ones back."""
        self.counters.num_skipped += 1
        self._drop_gradient()
        logger.warning("batch-skipped", extra={"fields": {"reason": reason}})
        if not self._guard.is_sound():
            self._restore("weights-not-finite", float("nan"))

    def _restore(self, reason: str, loss: float) -> None:
        self._guard.restore()
        self._optimiser.reset()
        self._drop_gradient()
        self.counters.num_restored += 1
        self.counters.rate_ratio *= _RESTORED_RATE
        fields = {"reason": reason, "loss": loss, "rate_ratio": self.counters.rate_ratio}
        logger.warning("weights-restored", extra={"fields": fields})

    def _drop_gradient(self) -> None:
        self._optimiser.zero_grad()
        self._loss_sum, self._weight_sum, self._batch_tokens = 0.0, 0.0, 0

    def _adapt(self) -> None:
        """Learn slower where learning made the draft worse, faster where it helps much.

        A draft that fits loses by the rate that one needs whose traffic has changed.
        """
        self._texts_since_adapted += 1
        gain = self.first_sight.gain(_JUDGED_TEXTS)
        if gain is None or self._texts_since_adapted < _JUDGED_TEXTS:
            return
        ratio = self.counters.rate_ratio
        if gain < -_MAX_LOSS:
            try:
                self.reset(self.first_sight.incumbent)
            except (UnsupportedModelError, OSError):
                # It left the registry; the next comparison names another one.
                return
            self.counters.rate_ratio = max(_LEAST_RATE, _RESTORED_RATE * ratio)
            self.counters.num_restored += 1
            fields = {"gain": gain, "rate_ratio": self.counters.rate_ratio}
            logger.info("learned-worse", extra={"fields": fields})
        elif gain > _MUCH_GAINED:
            self.counters.rate_ratio = min(1.0, ratio / _RESTORED_RATE)
        self._texts_since_adapted = 0

    # -- results --------------------------------------------------------------------------

    def export(self, directory: Path, card: Mapping[str, Any] | None = None) -> None:
        """Write the draft as it is now.

        Raises:
            OSError: it cannot be written, and nothing was.
        """
        self.settle()
        figures = asdict(self.counters)
        self._learnable.save(directory, {"format": 1, **(card or {}), "learned": figures})

    def judging(
        self, incumbent: Path, candidate: Path | None = None, domain: str = ""
    ) -> Iterator[Pair]:
        """Yield held-out texts, of a domain or all, with (candidate, incumbent) on each.

        The candidate is the draft as it is now, so nothing may be learned in between, unless a
        directory is given.

        Raises:
            UnsupportedModelError: a draft cannot be loaded.
        """
        self.settle()
        load = self._learnable.load
        mine = self.model if candidate is None else load(candidate)
        other = load(incumbent)
        domains = [domain] if domain else self.replay.domains
        texts = [text for name in domains for text in self.replay.held_out(name)]
        return ((text, (judge(mine, text), judge(other, text))) for text in texts)

    def reset(self, directory: Path) -> None:
        """Go on from another checkpoint, with what was seen but without what was learned.

        Raises:
            UnsupportedModelError: it cannot be trained, or is of another shape.
        """
        self._learnable.reset(directory)
        self._under_way = None
        self._drop_gradient()
        self._optimiser.reset()
        self._guard.reset()
        self.first_sight.restart(directory)
        self._tokens_left = self.options.max_passes * self.replay.num_tokens
        self.counters.steps_since_reset, self.counters.rate_ratio = 0, 1.0

    # -- state ----------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """Return all that `restore` needs: tensors by file, and JSON values."""
        self.settle()
        for text in self.first_sight.release():
            self._release(text)
        replay, replay_values = self.replay.state()
        moments, num_moments = self._optimiser.state()
        domains = {n: torch.from_numpy(a) for n, a in self._domains.to_arrays().items()}
        tensors = {
            "weights": {name: p.data for name, p in self.model.named_parameters()},
            "moments": moments,
            "replay": replay,
            "domains": domains,
        }
        return tensors, {
            "source": self._learnable.source,
            "counters": asdict(self.counters),
            "optimiser_steps": num_moments,
            "replay": replay_values,
        }

    def restore(
        self, tensors: Mapping[str, Mapping[str, torch.Tensor]], values: Mapping[str, Any]
    ) -> None:
        """Take over a state; a learner for which this raises must not be used.

        Raises:
            ValueError, KeyError, TypeError: it is none, or that of another draft.
        """
        counters = Counters(**values["counters"])
        for name, parameter in self.model.named_parameters():
            other = tensors["weights"][name]
            if other.shape != parameter.shape:
                raise ValueError(f"weights of {name}: {tuple(other.shape)}")
            parameter.data.copy_(other)
        if not self._guard.is_sound():
            raise ValueError("weights that are not finite")
        self._optimiser.restore(tensors["moments"], int(values["optimiser_steps"]))
        self.replay.restore(tensors["replay"], values["replay"])
        self._tokens_left = self.options.max_passes * self.replay.num_tokens
        arrays = {name: tensor.numpy() for name, tensor in tensors["domains"].items()}
        self._domains = Domains.from_arrays(arrays)
        self._guard.reset()
        self.counters = counters
