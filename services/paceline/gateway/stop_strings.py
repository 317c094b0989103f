"""Finds stop strings in text that comes in pieces, and holds back what may begin one.

Knuth, Morris and Pratt's search: constant time per character and string on average, whatever
the strings repeat. A request's outputs share the tables. detokenizer.py calls this.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The stop strings of a request."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.patterns = [_Pattern(string) for string in dict.fromkeys(strings)]


class StopSearch:
    """Searches the text of one output."""

    def __init__(self, stop: StopStrings) -> None:
        self._patterns = stop.patterns
        self._matched = [0] * len(self._patterns)
        self._held = ""
        self.is_stopped = False

    @property
    def is_active(self) -> bool:
        """Whether there is anything to find."""
        return bool(self._patterns)

    def push(self, text: str) -> str:
        """Add text; return what can no longer be part of a stop string.

        Where several strings end within `text`, the one that begins first counts.
        """
        if not self._patterns or not text:
            return text
        starts = []
        for i, pattern in enumerate(self._patterns):
            self._matched[i], end = pattern.search(text, self._matched[i])
            if end is not None:
                starts.append(len(self._held) + end - len(pattern.text))
        self._held += text
        if starts:
            self.is_stopped = True
            final, self._held = self._held[: min(starts)], ""
            return final
        cut = len(self._held) - max(self._matched)
        final, self._held = self._held[:cut], self._held[cut:]
        return final

    def would_stop(self, text: str) -> bool:
        """Tell whether a stop string would end within `text`, without adding it."""
        matches = zip(self._patterns, self._matched, strict=True)
        return any(pattern.search(text, matched)[1] is not None for pattern, matched in matches)

    def finish(self) -> str:
        """Return what is held: no more text comes."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """One stop string, with the lengths of its borders as far as they were needed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._borders = [0, 0]
        """[k]: length of the longest proper prefix of text[:k] that also ends it."""

    def search(self, text: str, matched: int) -> tuple[int, int | None]:
        """Search on behind text that ended in `matched` characters of the pattern.

        Returns the same number behind `text`, and where in `text` the pattern ended, if it did.
        """
        at = 0
        while at < len(text):
            if matched == 0:
                at = text.find(self.text[0], at)
                if at < 0:
                    return 0, None
            matched = self._advance(matched, text[at])
            at += 1
            if matched == len(self.text):
                return matched, at
        return matched, None

    def _advance(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._border(matched)
        return matched + 1 if self.text[matched] == char else 0

    def _border(self, length: int) -> int:
        while len(self._borders) <= length:
            end = len(self._borders) - 1
            self._borders.append(self._advance(self._borders[end], self.text[end]))
        return self._borders[length]
