"""The kinds of draft that a learner can train: what it needs to know of each.

A kind owns the draft and its checkpoints; learner.py owns time, memory and the optimiser. A new
kind is one class and one line in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from paceline.domain.drafts import MEDUSA_DRAFTER, MODEL_DRAFTER
from paceline.domain.learnings import Sample
from paceline.engine.models.config import UnsupportedModelError, load_model_config
from paceline.trainer.checkpoint import load_draft, save_draft
from paceline.trainer.decoder import DraftModel
from paceline.trainer.guessing import GuessingModel
from paceline.trainer.heads import HeadsModel, load_heads, new_heads, save_heads
from paceline.trainer.learner_options import LearnerOptions
from paceline.trainer.micro_batches import lesson_of
from paceline.trainer.samples import text_of
from paceline.trainer.texts import Text


class Learnable(Protocol):
    """A draft that learns, of some kind."""

    @property
    def model(self) -> GuessingModel:
        """The draft as it is now; the same object for ever."""
        ...

    @property
    def source(self) -> str:
        """Directory that it was started from; empty if from nothing."""
        ...

    def text(self, sample: Sample) -> Text | None:
        """Return a sample as a text; None if it lacks what this kind learns from.

        Raises:
            ValueError: it is corrupt; says how.
        """
        ...

    def lesson(self, text: Text) -> Text | None:
        """Return the part of a text that is computed on to learn; None if there is nothing."""
        ...

    def load(self, directory: Path) -> GuessingModel:
        """Load another draft of this kind.

        Raises:
            UnsupportedModelError: it is none.
        """
        ...

    def reset(self, directory: Path) -> None:
        """Be what a checkpoint is.

        Raises:
            UnsupportedModelError: it cannot be trained, or is of another shape.
        """
        ...

    def save(self, directory: Path, card: Mapping[str, Any]) -> None:
        """Write the draft as it is now.

        Raises:
            OSError: it cannot be written, and nothing was.
        """
        ...


class SmallModel:
    """A small model with the target's vocabulary."""

    def __init__(self, options: LearnerOptions) -> None:
        """Load the options' draft.

        Raises:
            UnsupportedModelError: it cannot be trained.
        """
        self._source = Path(options.draft)
        self._model = load_draft(self._source)

    @property
    def model(self) -> DraftModel:
        """The draft."""
        return self._model

    @property
    def source(self) -> str:
        """Directory whose tokenizer is saved with it."""
        return str(self._source)

    def text(self, sample: Sample) -> Text:
        """Return a sample as a text, without hidden states."""
        return text_of(sample, self._model.shape.vocab_size)

    def lesson(self, text: Text) -> Text | None:
        """Return all of a text: the model reads its context."""
        return lesson_of(text)

    def load(self, directory: Path) -> DraftModel:
        """Load another draft."""
        return load_draft(directory)

    def reset(self, directory: Path) -> None:
        """Take over weights, format and configuration."""
        other = load_draft(directory)
        if other.shape != self._model.shape:
            shapes = f"{other.shape}, expected {self._model.shape}"
            raise UnsupportedModelError(f"a draft of shape {shapes}")
        self._model.load_state_dict(other.state_dict())
        self._model.raw_config = other.raw_config
        self._model.weight_dtype = other.weight_dtype
        self._source = directory

    def save(self, directory: Path, card: Mapping[str, Any]) -> None:
        """Write a checkpoint that loads wherever the target does."""
        save_draft(self._model, self._source, load_model_config(self._source), directory, card)


class Heads:
    """Medusa heads on the target's hidden states."""

    def __init__(self, options: LearnerOptions) -> None:
        """Load the options' heads, or begin with ones that have learned nothing.

        Raises:
            UnsupportedModelError: they or the target cannot be loaded.
        """
        self._target = Path(options.target)
        self._source = options.draft
        self._model = (
            load_heads(Path(options.draft), self._target)
            if options.draft
            else new_heads(self._target, options.num_heads, options.num_layers)
        )

    @property
    def model(self) -> HeadsModel:
        """The heads."""
        return self._model

    @property
    def source(self) -> str:
        """Directory of the heads that were loaded."""
        return self._source

    def text(self, sample: Sample) -> Text | None:
        """Return a sample as a text with hidden states; None if it has none."""
        sizes = self._model.config
        text = text_of(sample, sizes.vocab_size, sizes.hidden_size)
        return None if text.hidden_TE is None else text

    def lesson(self, text: Text) -> Text | None:
        """Return the captured part: heads read states, no tokens.

        What the target said behind the first state is what its own head says, so no head's lesson.
        """
        captured = text.window(text.first, len(text.tokens_T))
        weights_T = np.concatenate((np.zeros(1, np.float32), captured.weights_T[1:]))
        return lesson_of(replace(captured, weights_T=weights_T))

    def load(self, directory: Path) -> HeadsModel:
        """Load other heads of the target."""
        return load_heads(directory, self._target)

    def reset(self, directory: Path) -> None:
        """Take over other heads."""
        other = load_heads(directory, self._target)
        if other.config != self._model.config:
            raise UnsupportedModelError(f"heads of {other.config}, expected {self._model.config}")
        self._model.become(other)
        self._source = str(directory)

    def save(self, directory: Path, card: Mapping[str, Any]) -> None:
        """Write heads that the engine loads."""
        save_heads(self._model, directory, card)


LEARNABLES: dict[str, Callable[[LearnerOptions], Learnable]] = {
    MODEL_DRAFTER: SmallModel,
    MEDUSA_DRAFTER: Heads,
}
