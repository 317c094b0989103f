"""How much is learned at a time: micro-batches whose time fits, whatever machine this is.

The time of forward and backward is about linear in tokens, so tokens are the measured rate times
the seconds there are. learner.py asks before and tells after each one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

from paceline.trainer.positions import weighed
from paceline.trainer.texts import Text

LEAST_TOKENS = 16
"""Less teaches nothing; a machine that needs longer for them takes longer."""

_FIRST_RATE = 2000.0
"""Tokens per second before any was measured: careful."""
_HEADROOM = 0.8
"""Of the time, for what varies."""
_SMOOTHING = 0.3
_HOPE = 1.5
"""By which a rate too low for the time there is rises, so that one slow moment is not for ever."""
_MAX_EMPTY = 64
"""Texts without anything to learn in a row after which there is nothing."""


class Pace:
    """The measured rate of learning."""

    def __init__(self) -> None:
        self._rate = _FIRST_RATE

    def tokens_for(self, seconds: float, most: int) -> int:
        """Return the tokens that fit into a time; 0 if not even the least."""
        fitting = int(_HEADROOM * seconds * self._rate)
        return min(most, fitting) if fitting >= LEAST_TOKENS else 0

    def note(self, num_tokens: int, seconds: float) -> None:
        """Note what a micro-batch took."""
        rate = num_tokens / max(seconds, 1e-6)
        self._rate += _SMOOTHING * (rate - self._rate)

    def hope(self) -> None:
        """Note that there was too little time for anything."""
        self._rate = min(_FIRST_RATE, self._rate * _HOPE)


class TextSource(Protocol):
    """Where texts come from: a replay buffer, or a part of one."""

    def draw(self, recent_ratio: float) -> Text | None:
        """Return a text to learn from; None if there is none."""
        ...


def lesson_of(text: Text) -> Text | None:
    """Return a text if it says anything."""
    return text if text.weights_T.any() else None


class MicroBatches:
    """Draws micro-batches from a replay buffer."""

    def __init__(
        self,
        replay: TextSource,
        positions: str,
        recent_ratio: float,
        lesson: Callable[[Text], Text | None] = lesson_of,
    ) -> None:
        """Draw from a buffer.

        Args:
            replay: has the texts.
            positions: name of a choice of positions.
            recent_ratio: share of the draws that follow the last arrivals.
            lesson: returns the part of a text to learn from; None if there is nothing to learn.
        """
        self._lesson = lesson
        self._replay = replay
        self._positions = positions
        self._recent_ratio = recent_ratio
        self._ahead: Text | None = None
        """Drawn, but there was no room."""

    def draw(self, num_tokens: int, seed: int) -> list[Text]:
        """Return texts of up to so many tokens, or a part of one; empty if there are none."""
        texts: list[Text] = []
        room = num_tokens
        while room >= LEAST_TOKENS or not texts:
            text = self._ahead or self._next()
            self._ahead = None
            if text is None:
                break
            if len(text.tokens_T) > room:
                if texts:
                    # Cutting it would waste it, dropping it would favour short ones.
                    self._ahead = text
                    break
                text = cut(text, room, seed)
            texts.append(text)
            room -= len(text.tokens_T)
        return texts

    def _next(self) -> Text | None:
        for _ in range(_MAX_EMPTY):
            text = self._replay.draw(self._recent_ratio)
            if text is None:
                return None
            lesson = self._lesson(weighed(text, self._positions))
            if lesson is not None:
                return lesson
        return None


def cut(text: Text, length: int, seed: int) -> Text:
    """Return a part of a longer text in which something is learned, by the seed.

    context . . . . . . [ begin        end )
    weights                   ^ one of them, with half of the room before it if there is
    """
    places = text.weights_T.nonzero()[0]
    place = int(random.Random(seed).choice(places))
    begin = min(max(0, place - length // 2), len(text.tokens_T) - length)
    return text.window(begin, begin + length)
