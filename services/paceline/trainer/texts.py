"""Texts with what the target thought at each of their positions, and batches of them.

Samples of live traffic have the same form: verification knows the target's likeliest tokens at
every position it computed (samples.py). Writer fills it, train.py reads batches, evaluate.py
held-out texts.

Shape legend: T tokens of a text, K named tokens, E the target's hidden size, B rows, R tokens of
a row, N positions that are learned from.

A row holds several texts, none of which sees another:

    tokens     [a0 a1 a2 a3 | b0 b1 b2 | . . ]
    positions  [ 0  1  2  3 |  0  1  2 | 0 0 ]
    learned    position i says what comes at i + 1; the last one of a text has no successor
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from paceline.trainer.losses import TargetProbs

_ROW_TOKENS = 256
"""Of a row with several texts; attention costs its square."""


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Tokens, and the target's distribution behind some of them."""

    tokens_T: npt.NDArray[np.int32]
    top_ids_TK: npt.NDArray[np.int32]
    """Likeliest tokens behind each position, best first; rows without weight mean nothing."""
    top_logprobs_TK: npt.NDArray[np.float16]
    """Of the unmodified distribution (temperature 1); -inf where fewer are known."""
    weights_T: npt.NDArray[np.float32]
    """How much a position counts; 0 where the target was not asked."""
    temperature: float = 1.0
    """At which its answer was drawn."""
    first: int = 0
    """Position of the first row of the two arrays above; earlier positions have no weight."""
    origins_T: npt.NDArray[np.uint8] | None = None
    """How the token behind each position came about (TokenOrigin); None where nobody noted it."""
    domain: str = ""
    """What kind of text it is."""
    hidden_TE: npt.NDArray[np.float16] | None = None
    """The target's final hidden state at each position, row for row with `top_ids_TK`; None where
    nobody wants it."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        arrays = (self.tokens_T, self.top_ids_TK, self.top_logprobs_TK, self.weights_T)
        others = [a for a in (self.origins_T, self.hidden_TE) if a is not None]
        return sum(array.nbytes for array in (*arrays, *others))

    def window(self, begin: int, end: int) -> Text:
        """Return the tokens from `begin` up to `end` as a text of its own, without copying.

        tokens    [ . . begin . . . first . . end . . ]
        rows                        [ . . . . . . . ]
        """
        rows = slice(max(0, begin - self.first), max(0, end - self.first))
        return replace(
            self,
            tokens_T=self.tokens_T[begin:end],
            top_ids_TK=self.top_ids_TK[rows],
            top_logprobs_TK=self.top_logprobs_TK[rows],
            weights_T=self.weights_T[begin:end],
            first=max(0, self.first - begin),
            origins_T=None if self.origins_T is None else self.origins_T[begin:end],
            hidden_TE=None if self.hidden_TE is None else self.hidden_TE[rows],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Packed rows and the positions to learn from."""

    tokens_BR: torch.Tensor
    positions_BR: torch.Tensor
    visible_BRR: torch.Tensor
    """Whether token i of a row sees token j."""
    learned_N: torch.Tensor
    """Places in the flattened rows."""
    target: TargetProbs
    weights_N: torch.Tensor
    num_tokens: int
    """Of texts; the rest of the rows is padding."""


class TextPool:
    """Texts to learn from, in bounded memory; the oldest ones go. Each is met equally often."""

    def __init__(self, max_bytes: int, seed: int) -> None:
        self._max_bytes = max_bytes
        self._random = random.Random(seed)
        self._texts: deque[Text] = deque()
        self._ahead: list[Text] = []
        """Order of the current pass, read from its end."""
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, texts: Sequence[Text]) -> None:
        """Add texts; they are met in the current pass."""
        self._texts.extend(texts)
        self._ahead.extend(texts)
        self._random.shuffle(self._ahead)
        self._num_bytes += sum(text.nbytes for text in texts)
        while self._num_bytes > self._max_bytes and len(self._texts) > 1:
            self._num_bytes -= self._texts.popleft().nbytes

    def draw(self, num_rows: int, row_tokens: int) -> list[list[Text]]:
        """Return texts for so many rows, each text in the fullest row that has room for it.

        Ends at the first text that fits nowhere; with 8 rows some 5 % stay empty.
        """
        rows: list[list[Text]] = [[] for _ in range(num_rows)]
        room = [row_tokens] * num_rows
        while True:
            text = self._next()
            length = min(len(text.tokens_T), row_tokens)
            fitting = [i for i in range(num_rows) if room[i] >= length]
            if not fitting:
                self._ahead.append(text)
                return rows
            tightest = min(fitting, key=lambda i: room[i])
            rows[tightest].append(text)
            room[tightest] -= length

    def _next(self) -> Text:
        if not self._ahead:
            self._ahead = list(self._texts)
            self._random.shuffle(self._ahead)
        return self._ahead.pop()


def pack(rows: Sequence[Sequence[Text]], row_tokens: int) -> Batch:
    """Lay texts out in rows of `row_tokens`; what is longer loses its end."""
    shape = len(rows), row_tokens
    tokens_BR, positions_BR = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    owners_BR = np.full(shape, -1, np.int64)
    learned, picked = [], []
    for b, row in enumerate(rows):
        begin = 0
        for t, text in enumerate(row):
            length = min(len(text.tokens_T), row_tokens - begin)
            here = slice(begin, begin + length)
            tokens_BR[b, here] = text.tokens_T[:length]
            positions_BR[b, here] = np.arange(length)
            owners_BR[b, here] = t
            # The successor of the last position is cut off or unknown.
            places = np.flatnonzero(text.weights_T[: length - 1])
            learned.append(places + begin + b * row_tokens)
            picked.append((text, places))
            begin += length
    owners = torch.from_numpy(owners_BR)
    earlier_RR = torch.ones(row_tokens, row_tokens, dtype=torch.bool).tril()
    return Batch(
        torch.from_numpy(tokens_BR),
        torch.from_numpy(positions_BR),
        (owners[:, :, None] == owners[:, None, :]) & earlier_RR,
        torch.from_numpy(np.concatenate(learned)),
        target_probs(picked),
        torch.from_numpy(np.concatenate([text.weights_T[places] for text, places in picked])),
        int((owners_BR >= 0).sum()),
    )


def pack_tightly(texts: Sequence[Text]) -> Batch:
    """Lay whole texts out in as few rows as their order allows."""
    row_tokens = max(_ROW_TOKENS, max(len(text.tokens_T) for text in texts))
    rows: list[list[Text]] = [[]]
    used = 0
    for text in texts:
        if used + len(text.tokens_T) > row_tokens:
            rows.append([])
            used = 0
        rows[-1].append(text)
        used += len(text.tokens_T)
    longest = max(sum(len(text.tokens_T) for text in row) for row in rows)
    return pack(rows, longest)


def target_probs(picked: Sequence[tuple[Text, npt.NDArray[np.int64]]]) -> TargetProbs:
    """Return what the target says behind some positions of texts."""
    # A capture may have been set to name fewer tokens; the rest of the others joins their tail.
    top = min(text.top_ids_TK.shape[1] for text, _ in picked)
    rows = [(text, places - text.first) for text, places in picked]
    ids_NK = np.concatenate([text.top_ids_TK[row, :top] for text, row in rows])
    logprobs_NK = np.concatenate([text.top_logprobs_TK[row, :top] for text, row in rows])
    drawn_N = np.concatenate([text.tokens_T[places + 1] for text, places in picked])
    return TargetProbs(
        torch.from_numpy(ids_NK.astype(np.int64)),
        torch.from_numpy(logprobs_NK.astype(np.float32)).exp(),
        torch.from_numpy(drawn_N.astype(np.int64)),
    )
