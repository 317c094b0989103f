"""Writing and learning in turn, until the time is over.

The target writes fresh text (writer.py), the draft learns from it and from what is kept of
earlier text, its agreement is measured, and again. create.py calls this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from paceline.trainer.decoder import DraftModel
from paceline.trainer.evaluate import measure
from paceline.trainer.options import CreateOptions
from paceline.trainer.texts import Text, TextPool, pack
from paceline.trainer.train import Trainer, TrainPlan, has_fast_bf16
from paceline.trainer.writer import TargetWriter

Say = Callable[[str], None]
Monotonic = Callable[[], float]

POOL_BYTES = 256 << 20
"""Of text that is kept to be read again; some 300,000 tokens."""

_NUM_ROUNDS = 30
"""Writing and learning alternate about so often."""
_WRITE_SHARE = 0.4
"""Of a round's time."""
_LEARNING_RATE = 2e-3
_RATE_WIDTH = 160
"""Width up to which the rate above was found good."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The time for learning."""

    begin_s: float
    end_s: float
    monotonic: Monotonic

    @property
    def progress(self) -> float:
        """Share of it that is over."""
        length_s = max(self.end_s - self.begin_s, 1e-3)
        return min(1.0, (self.monotonic() - self.begin_s) / length_s)


@dataclass(slots=True)
class Totals:
    """What was done."""

    tokens_written: int = 0
    """By the target."""
    tokens_trained: int = 0
    """Read by the draft; each text several times."""
    num_steps: int = 0


def distil(
    options: CreateOptions,
    model: DraftModel,
    writer: TargetWriter,
    held_out: list[Text],
    clock: Clock,
    say: Say,
) -> Totals:
    """Train the model until the time is over, at least one step."""
    trainer = Trainer(model, _train_plan(model))
    pool = TextPool(POOL_BYTES, options.seed)
    totals = Totals()
    round_s = (clock.end_s - clock.begin_s) / _NUM_ROUNDS
    while totals.num_steps == 0 or clock.progress < 1.0:
        begun_s = clock.monotonic()
        texts = writer.take(begun_s + _WRITE_SHARE * round_s, clock.monotonic)
        pool.add(texts)
        totals.tokens_written += sum(len(text.tokens_T) for text in texts)
        loss = _learn(options, trainer, pool, clock, begun_s + round_s, totals)
        found = measure(model, held_out)
        say(
            f"{100 * clock.progress:3.0f} %  written {totals.tokens_written:,}"
            f"  trained {totals.tokens_trained:,}  loss {loss:.3f}"
            f"  greedy agreement {found.greedy:.3f}  overlap {found.overlap:.3f}"
        )
    return totals


def _learn(
    options: CreateOptions,
    trainer: Trainer,
    pool: TextPool,
    clock: Clock,
    deadline_s: float,
    totals: Totals,
) -> float:
    """Step until the deadline, at least once; return the mean loss."""
    row_tokens = options.context_tokens
    num_rows = max(1, options.batch_tokens // row_tokens)
    losses: list[float] = []
    while not losses or (clock.monotonic() < deadline_s and clock.progress < 1.0):
        batch = pack(pool.draw(num_rows, row_tokens), row_tokens)
        losses.append(trainer.step(batch, clock.progress))
        totals.tokens_trained += batch.num_tokens
        totals.num_steps += 1
    return sum(losses) / len(losses)


def _train_plan(model: DraftModel) -> TrainPlan:
    """Return a plan whose rate falls with the width, as steps of wide layers add up."""
    rate = _LEARNING_RATE * min(1.0, _RATE_WIDTH / model.shape.hidden_size)
    return TrainPlan(learning_rate=rate, is_bf16=has_fast_bf16())
