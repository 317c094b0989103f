"""What is kept of traffic to learn from and to judge on, within bounded memory.

Memory is shared by max-min fairness: when it is short, the domain with the most bytes gives way,
so a domain within its equal share never loses anything to others, and one that fell silent stays
represented and is not forgotten. shelf.py says what a domain gives up first. Deterministic: the
same texts and seed give the same draws, also after saving and loading in between.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from paceline.trainer.shelf import Shelf
from paceline.trainer.texts import Text

OTHER = "other"
"""Where domains go that come when there are as many as may be: labels are the clients' choice."""

_MAX_DOMAINS = 64
_RECENT_TEXTS = 256
"""Arrivals that count as recent."""
_NEWEST_RATIO = 0.5
"""Least share of a domain's bytes to learn from for its newest texts when memory is short."""


class ReplayBuffer:
    """Texts by domain."""

    def __init__(self, max_bytes: int, *, seed: int = 0, held_out_every: int = 8) -> None:
        self._max_bytes = max_bytes
        self._seed = seed
        self._held_out_every = held_out_every
        self._shelves: dict[str, Shelf] = {}
        self._arrivals: deque[str] = deque(maxlen=_RECENT_TEXTS)
        """Domains of the last texts to learn from."""
        self._num_bytes = 0
        self._num_retired = 0
        self._num_draws = 0

    def __len__(self) -> int:
        """Return the number of texts to learn from."""
        return sum(shelf.num_texts for shelf in self._shelves.values())

    @property
    def num_bytes(self) -> int:
        """Of all texts."""
        return self._num_bytes

    @property
    def num_tokens(self) -> int:
        """Of the texts to learn from."""
        return sum(shelf.num_tokens for shelf in self._shelves.values())

    @property
    def domains(self) -> list[str]:
        """Domains that have texts."""
        return sorted(self._shelves)

    def num_texts(self, domain: str) -> int:
        """Return the number of texts of a domain to learn from."""
        return self._shelves[domain].num_texts if domain in self._shelves else 0

    def text_at(self, domain: str, index: int) -> Text:
        """Return one of a domain's texts to learn from, older ones first."""
        return self._shelves[domain].text_at(index)

    def held_out(self, domain: str) -> list[Text]:
        """Return the texts of a domain to judge on, oldest first."""
        return list(self._shelves[domain].held_out) if domain in self._shelves else []

    def add(self, text: Text) -> None:
        """Keep a text; others go if memory is short."""
        domain = self.shelf_of(text.domain)
        is_held_out = self.is_held_out(text)
        self._shelves.setdefault(domain, Shelf()).add(text, is_held_out=is_held_out)
        self._num_bytes += text.nbytes
        if not is_held_out:
            self._arrivals.append(domain)
        while self._num_bytes > self._max_bytes and self._shrink():
            pass

    def shelf_of(self, domain: str) -> str:
        """Return where texts of a domain are: its name, or OTHER if there are too many."""
        is_new = domain not in self._shelves and len(self._shelves) >= _MAX_DOMAINS
        return OTHER if is_new else domain

    def is_held_out(self, text: Text) -> bool:
        """Tell the side of a text: by its context alone, so that answers to one prompt agree."""
        context = text.tokens_T[: text.first + 1].astype("<i4").tobytes()
        digest = int.from_bytes(blake3(context).digest(8), "little")
        return digest % self._held_out_every == 0

    def draw(self, recent_ratio: float) -> Text | None:
        """Return a text to learn from; None if there is none.

        `recent_ratio` of the draws follow the last arrivals, in their proportions; the others take
        every domain with the same probability and every text of it too.
        """
        self._num_draws += 1
        # By number, so that a loaded buffer goes on where the saved one was.
        chance = random.Random(self._seed << 40 | self._num_draws)
        if chance.random() < recent_ratio and self._arrivals:
            domain = chance.choice(self._arrivals)
            shelf = self._shelves.get(domain, Shelf())
            num_recent = min(self._arrivals.count(domain), len(shelf.newest))
            if num_recent:
                return shelf.newest[-1 - chance.randrange(num_recent)]
        domains = [name for name in self.domains if self._shelves[name].num_texts]
        if not domains:
            return None
        shelf = self._shelves[chance.choice(domains)]
        return shelf.text_at(chance.randrange(shelf.num_texts))

    def _shrink(self) -> bool:
        """Give up one text of the largest domain; False if there is but one text left."""
        if sum(self.counts().values()) <= 1:
            return False
        name = max(self.domains, key=lambda name: self._shelves[name].num_bytes)
        shelf = self._shelves[name]
        before = shelf.num_bytes
        # Beyond their share the held-out texts go, and where there is nothing else.
        is_over = shelf.held_out_bytes * self._held_out_every > before
        if shelf.held_out and (is_over or not shelf.num_texts):
            shelf.drop_held_out()
        else:
            learned = shelf.newest_bytes + shelf.older_bytes
            while shelf.newest_bytes > _NEWEST_RATIO * learned or not shelf.older:
                self._retire(shelf)
            shelf.drop_older()
        self._num_bytes -= before - shelf.num_bytes
        if not shelf.num_bytes:
            del self._shelves[name]
        return True

    def _retire(self, shelf: Shelf) -> None:
        self._num_retired += 1
        key = random.Random(~(self._seed << 40 | self._num_retired)).random()
        shelf.retire(key, self._num_retired)

    # -- state ----------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return arrays and JSON values that `from_state` reads."""
        entries, arrays = [], {}
        for domain in self.domains:
            for place, key, number, text in self._shelves[domain].places():
                entries.append(
                    {
                        "shelf": domain,
                        "place": place,
                        "key": key,
                        "number": number,
                        "domain": text.domain,
                        "temperature": text.temperature,
                        "first": text.first,
                    }
                )
                name = str(len(entries) - 1)
                arrays.update({f"{name}.{part}": x for part, x in _parts(text).items()})
        values = {
            "entries": entries,
            "arrivals": list(self._arrivals),
            "num_retired": self._num_retired,
            "num_draws": self._num_draws,
        }
        return arrays, values

    def restore(self, arrays: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Take over a state; bounds are this buffer's own.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        for i, entry in enumerate(values["entries"]):
            text = Text(
                arrays[f"{i}.tokens"].numpy(),
                arrays[f"{i}.ids"].numpy(),
                arrays[f"{i}.logprobs"].numpy(),
                arrays[f"{i}.weights"].numpy(),
                float(entry["temperature"]),
                int(entry["first"]),
                arrays[f"{i}.origins"].numpy() if f"{i}.origins" in arrays else None,
                str(entry["domain"]),
                arrays[f"{i}.hidden"].numpy() if f"{i}.hidden" in arrays else None,
            )
            shelf = self._shelves.setdefault(entry["shelf"], Shelf())
            shelf.put(entry["place"], float(entry["key"]), int(entry["number"]), text)
            self._num_bytes += text.nbytes
        self._arrivals.extend(d for d in values["arrivals"] if d in self._shelves)
        self._num_retired, self._num_draws = int(values["num_retired"]), int(values["num_draws"])
        while self._num_bytes > self._max_bytes and self._shrink():
            pass

    def counts(self) -> Counter[str]:
        """Return the number of texts by domain, held-out ones included."""
        return Counter({n: s.num_texts + len(s.held_out) for n, s in self._shelves.items()})


def _parts(text: Text) -> dict[str, torch.Tensor]:
    parts = {
        "tokens": text.tokens_T,
        "ids": text.top_ids_TK,
        "logprobs": text.top_logprobs_TK,
        "weights": text.weights_T,
    }
    if text.origins_T is not None:
        parts["origins"] = text.origins_T
    if text.hidden_TE is not None:
        parts["hidden"] = text.hidden_TE
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in parts.items()}
