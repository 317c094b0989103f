"""One domain's share of the replay buffer: the newest texts, a fair draw of older ones, held-out.

    arrives -> [ newest, in order ] -> [ older: those with the largest keys ]      learned from
    arrives -> [ held out, in order ]                                              judged on

What the newest push out gets a random key once; when bytes are short the smallest key goes. So
the older ones are at any time a uniform draw from all that came before, whatever the budget was
meanwhile (bottom-k sampling, Cohen and Kaplan 2007), which a reservoir of fixed size is not.
replay.py decides when bytes are short.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from paceline.trainer.texts import Text


@dataclass(slots=True)
class Shelf:
    """Texts of one domain."""

    newest: deque[Text] = field(default_factory=deque)
    older: list[tuple[float, int, Text]] = field(default_factory=list)
    """A heap of (key, number, text)."""
    held_out: deque[Text] = field(default_factory=deque)
    newest_bytes: int = 0
    older_bytes: int = 0
    held_out_bytes: int = 0

    @property
    def num_texts(self) -> int:
        """Texts to learn from."""
        return len(self.newest) + len(self.older)

    @property
    def num_tokens(self) -> int:
        """Of the texts to learn from."""
        return sum(len(self.text_at(i).tokens_T) for i in range(self.num_texts))

    @property
    def num_bytes(self) -> int:
        """Of all texts."""
        return self.newest_bytes + self.older_bytes + self.held_out_bytes

    def add(self, text: Text, *, is_held_out: bool) -> None:
        """Put a text in."""
        if is_held_out:
            self.held_out.append(text)
            self.held_out_bytes += text.nbytes
        else:
            self.newest.append(text)
            self.newest_bytes += text.nbytes

    def retire(self, key: float, number: int) -> None:
        """Move the oldest of the newest to the older ones, under a key of its own."""
        text = self.newest.popleft()
        self.newest_bytes -= text.nbytes
        self.older_bytes += text.nbytes
        heapq.heappush(self.older, (key, number, text))

    def drop_older(self) -> None:
        """Give up the older text with the smallest key."""
        self.older_bytes -= heapq.heappop(self.older)[2].nbytes

    def drop_held_out(self) -> None:
        """Give up the oldest held-out text."""
        self.held_out_bytes -= self.held_out.popleft().nbytes

    def text_at(self, index: int) -> Text:
        """Return one of the texts to learn from, older ones first."""
        if index < len(self.older):
            return self.older[index][2]
        return self.newest[index - len(self.older)]

    def places(self) -> Iterator[tuple[str, float, int, Text]]:
        """Yield (place, key, number, text) of everything in an order that `put` restores."""
        for key, number, text in self.older:
            yield "older", key, number, text
        for text in self.newest:
            yield "newest", 0.0, 0, text
        for text in self.held_out:
            yield "held-out", 0.0, 0, text

    def put(self, place: str, key: float, number: int, text: Text) -> None:
        """Put back what `places` yielded.

        Raises:
            ValueError: there is no such place.
        """
        if place == "older":
            self.older.append((key, number, text))
            self.older_bytes += text.nbytes
        elif place in ("newest", "held-out"):
            self.add(text, is_held_out=place == "held-out")
        else:
            raise ValueError(f"replay: place {place!r}")
