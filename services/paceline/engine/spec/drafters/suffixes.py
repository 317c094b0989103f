"""Texts, and where any of their last few tokens stood before.

A trie of all windows holds a node per token and window length, a dictionary each. Here a text
is an array; of each run of ORDERS tokens only its newest place is in a dictionary, and every
place names the one before it with the same run (the hash chains of LZ77). Continuations are
read from the array when they are wanted, so what is walked is the same trie, made on the way.
Appending costs one dictionary entry per order and token.

    tokens   a b c d e f g        text 5, run of order 3 ending before place 4:
             0 1 2 3 4 5 6        newest[hash(b c d)] = 5 << TEXT_BITS | 4
                     ^ place = index of the token that follows the run
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

ORDERS = (5, 2, 1)
"""Lengths of runs that are indexed, longest first."""
LONGEST = 8
"""Tokens up to which a match is measured."""
TEXT_BITS = 9
TEXT_TOKENS = 1 << TEXT_BITS
"""Longest text; a longer stream goes on in a new one, whose first LONGEST tokens repeat the
end of the one before. Texts are what is let go of at once, so this bounds the time it takes."""
_NONE = -1
_ITEM = array("i").itemsize

Match = tuple["array[int]", int, int]
"""Tokens of a text, index of the one behind the match, length of the match."""


class _Text:
    """A piece of a stream."""

    __slots__ = ("number", "older", "stream", "tokens")

    def __init__(self, number: int, stream: int, carried: array[int]) -> None:
        self.number = number
        self.stream = stream
        self.tokens = array("i", carried)
        # Runs in what was carried over are indexed where they stood first.
        self.older = tuple(array("q", [_NONE]) * len(carried) for _ in ORDERS)


class SuffixIndex:
    """Finds earlier places of a suffix in the texts it was given."""

    def __init__(self) -> None:
        """Start without texts."""
        self._texts: OrderedDict[int, _Text] = OrderedDict()
        self._open: dict[int, _Text] = {}
        self._newest: tuple[dict[int, int], ...] = tuple({} for _ in ORDERS)
        self._next_number = 0
        self.num_tokens = 0
        """Tokens held, and so places indexed per order."""

    @property
    def num_entries(self) -> int:
        """Distinct runs known; at most `num_tokens` per order."""
        return sum(len(newest) for newest in self._newest)

    def append(self, stream: int, tokens: Sequence[int]) -> None:
        """Add tokens to the end of a stream."""
        at = 0
        while at < len(tokens):
            text = self._open.get(stream)
            if text is None or len(text.tokens) == TEXT_TOKENS:
                text = self._begin(stream, text)
            piece = tokens[at : at + TEXT_TOKENS - len(text.tokens)]
            self._index(text, piece)
            at += len(piece)

    def close(self, stream: int) -> None:
        """Note that nothing more will be appended to a stream; its texts stay."""
        self._open.pop(stream, None)

    def drop_oldest(self) -> None:
        """Forget the text that was begun first; there must be one."""
        _, text = self._texts.popitem(last=False)
        if self._open.get(text.stream) is text:
            del self._open[text.stream]
        self.num_tokens -= len(text.tokens)
        data, base = text.tokens.tobytes(), text.number << TEXT_BITS
        for order, newest, older in zip(ORDERS, self._newest, text.older, strict=True):
            # Backwards, so that a run's places in this text are passed one after the other.
            for end in range(len(older) - 1, order - 1, -1):
                key = hash(data[(end - order) * _ITEM : end * _ITEM])
                if newest.get(key) == base | end:
                    before = older[end] >> TEXT_BITS
                    if before == text.number or before in self._texts:
                        newest[key] = older[end]
                    else:
                        del newest[key]

    def find(self, suffix: Sequence[int], limit: int, other_than: int | None = None) -> list[Match]:
        """Return earlier places of the suffix, those of longer runs and newer ones first.

        Args:
            suffix: the last tokens of a sequence; LONGEST are enough.
            limit: most places, and most looked at per order.
            other_than: stream to leave out.
        """
        data = array("i", suffix).tobytes()
        found: dict[int, Match] = {}
        for rank, order in enumerate(ORDERS):
            if len(suffix) < order:
                continue
            place = self._newest[rank].get(hash(data[len(data) - order * _ITEM :]), _NONE)
            for _ in range(limit):
                text = self._texts.get(place >> TEXT_BITS)
                if text is None:
                    break
                end = place & (TEXT_TOKENS - 1)
                if place not in found and text.stream != other_than:
                    length = _common_suffix(suffix, text.tokens, end)
                    # Hashes may collide.
                    if length >= order:
                        found[place] = (text.tokens, end, length)
                place = text.older[rank][end]
            if len(found) >= limit:
                break
        return list(found.values())

    def _begin(self, stream: int, before: _Text | None) -> _Text:
        carried = before.tokens[-LONGEST:] if before is not None else array("i")
        text = _Text(self._next_number, stream, carried)
        self._next_number += 1
        self._texts[text.number] = self._open[stream] = text
        self.num_tokens += len(carried)
        return text

    def _index(self, text: _Text, tokens: Sequence[int]) -> None:
        start, base = len(text.tokens), text.number << TEXT_BITS
        text.tokens.extend(tokens)
        stop = len(text.tokens)
        self.num_tokens += stop - start
        first = max(0, start - ORDERS[0])
        data = text.tokens[first:].tobytes()
        for order, newest, older in zip(ORDERS, self._newest, text.older, strict=True):
            for end in range(start, stop):
                if end < order:
                    older.append(_NONE)
                    continue
                key = hash(data[(end - order - first) * _ITEM : (end - first) * _ITEM])
                older.append(newest.get(key, _NONE))
                newest[key] = base | end


def _common_suffix(suffix: Sequence[int], tokens: array[int], end: int) -> int:
    """Return how many tokens before `end` equal the last ones of `suffix`, up to LONGEST."""
    limit = min(LONGEST, end, len(suffix))
    length = 0
    while length < limit and suffix[-1 - length] == tokens[end - 1 - length]:
        length += 1
    return length
