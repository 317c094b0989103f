"""Texts are judged before they are learned from: how a draft does on traffic that is new to it.

Every text to learn from is met first by the draft as it is and by the one in use, and both are
scored (prequential, "test then train"; Dawid 1984). So all traffic serves for judging, the newest
counts as soon as it is there, and nothing is kept from learning for it. learner.py lets texts
wait here; gate.py reads the scores.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path

from paceline.engine.models.config import UnsupportedModelError
from paceline.trainer.guessing import GuessingModel
from paceline.trainer.judging import Judged, judge
from paceline.trainer.texts import Text

logger = logging.getLogger(__name__)

_MAX_WAITING = 256
"""Texts; beyond, the oldest is learned from without a score."""
_MAX_SCORES = 512

Pair = tuple[Text, tuple[Judged, Judged]]
"""A text with (the learning draft as it was then, the incumbent) on it."""


class FirstSight:
    """Texts that wait to be judged, and what came of those before."""

    def __init__(self, incumbent: Path, load: Callable[[Path], GuessingModel]) -> None:
        """Compare with the draft of a directory, which `load` reads."""
        self._directory = incumbent
        self._load = load
        self._incumbent: GuessingModel | None = None
        self._waiting: deque[Text] = deque()
        self._pairs: deque[Pair] = deque(maxlen=_MAX_SCORES)

    @property
    def incumbent(self) -> Path:
        """Directory of the draft that is compared with."""
        return self._directory

    def gain(self, count: int) -> float | None:
        """Return what the newest texts say the learning draft gained; None if there are fewer."""
        if len(self._pairs) < count:
            return None
        newest = list(self._pairs)[-count:]
        return sum(
            (mine.num_accepted - theirs.num_accepted) / mine.num_positions
            for _, (mine, theirs) in newest
        ) / len(newest)

    @property
    def has_waiting(self) -> bool:
        """Whether there is a text to judge."""
        return bool(self._waiting)

    def add(self, text: Text) -> Text | None:
        """Let a text wait; return one that has to be learned from as it is, if there is one."""
        self._waiting.append(text)
        return self._waiting.popleft() if len(self._waiting) > _MAX_WAITING else None

    def judge_next(self, model: GuessingModel) -> Text:
        """Score the text that waits longest and return it: it may be learned from now.

        Without a score where the incumbent cannot be read: it may have left the registry.
        """
        text = self._waiting.popleft()
        if self._incumbent is None:
            try:
                self._incumbent = self._load(self._directory)
            except (UnsupportedModelError, OSError) as error:
                logger.warning("incumbent-not-read", extra={"fields": {"error": str(error)}})
                return text
        pair = judge(model, text), judge(self._incumbent, text)
        if pair[0].num_positions:
            self._pairs.append((text, pair))
        return text

    def release(self) -> list[Text]:
        """Return the texts that wait, to be learned from without a score."""
        texts = list(self._waiting)
        self._waiting.clear()
        return texts

    def pairs(self, incumbent: Path) -> list[Pair]:
        """Return the scores beside a draft, oldest first.

        If it is not the one that was compared with there are none, and it is from now on.
        """
        if incumbent != self._directory:
            self.restart(incumbent)
        return list(self._pairs)

    def restart(self, incumbent: Path) -> None:
        """Forget the scores and compare with another draft; texts go on waiting."""
        self._directory, self._incumbent = incumbent, None
        self._pairs.clear()
