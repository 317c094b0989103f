"""Tokens to text, piece by piece: whole characters only, and never past a stop string.

The window technique of incremental detokenisation: decode the tokens since a prefix twice,
with and without the newest, and emit the difference once it ends in a whole character.
Joined pieces equal the tokenizer's own decoding of all tokens at once.
"""

from __future__ import annotations

from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING = 64
"""Tokens after which an incomplete character is taken to be broken for good."""


class Detokenizer:
    """Text of one output."""

    def __init__(self, tokenizer: Any, stop: list[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._prefix_at = 0
        self._read_at = 0
        self._held = ""
        self.is_stopped = False

    def push(self, token_ids: list[int]) -> tuple[str, int]:
        """Add tokens; return text that became final and how many of the tokens were used.

        Fewer are used when a stop string was met: those after it do not belong to the output.
        """
        text = ""
        for used, token in enumerate(token_ids, start=1):
            self._ids.append(token)
            text += self._release(self._decode_new(is_last=False))
            if self.is_stopped:
                return text, used
        return text, len(token_ids)

    def finish(self) -> str:
        """Return what was held back; the output is over."""
        if self.is_stopped:
            return ""
        text = self._release(self._decode_new(is_last=True))
        held, self._held = self._held, ""
        return text + ("" if self.is_stopped else held)

    def _decode_new(self, *, is_last: bool) -> str:
        before = self._decode(self._ids[self._prefix_at : self._read_at])
        now = self._decode(self._ids[self._prefix_at :])
        is_pending = len(self._ids) - self._read_at < _MAX_PENDING
        if len(now) < len(before) or (now.endswith(_REPLACEMENT) and is_pending and not is_last):
            return ""
        self._prefix_at, self._read_at = self._read_at, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _release(self, text: str) -> str:
        """Add text behind what is held; return what can no longer begin a stop string."""
        if not self._stop:
            return text
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            final, self._held = self._held[: min(found)], ""
            return final
        keep = max(_overlap(self._held, s) for s in self._stop)
        cut = len(self._held) - keep
        final, self._held = self._held[:cut], self._held[cut:]
        return final


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
