"""Which domain a sample belongs to: its client's label, else a cluster of its tokens.

Texts are hashed bags of tokens; one joins the cluster with the nearest centre, which moves towards
it (spherical k-means, Dhillon and Modha 2001, online). Every so often the last texts are
grouped anew, by average linkage: a group that is near no centre opens a cluster, if there is room.
So a cluster never starts from a single text, which says next to nothing. Tokens that stand in most
texts (the template, blanks) count less, by their inverse document frequency (Sparck Jones 1972),
itself kept online. Pure and deterministic: the same texts in the same order give the same names.

Texts of unit length share few tokens even within a domain, so nearness is freed of that noise: of
n texts with mean c, |mean of the domain|^2 is without bias (n |c|^2 - 1) / (n - 1); two groups of
one domain then have a cosine near 1.

Shape legend: B buckets, C clusters, W texts of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from paceline.domain.learnings import Sample

Vector = npt.NDArray[np.float64]

_NUM_BUCKETS = 2048
_MULTIPLIER = 2654435761
"""Of Knuth's multiplicative hash, 2^32 over the golden ratio."""
_WINDOW = 128
"""Texts that are grouped."""
_FIRST_GROUPING = 32
"""Texts before which all belong to one cluster."""
_GROUP_EVERY = 16
_SAME = 0.7
"""Cosine, freed of noise, from which two groups are one domain; domains of the demo have 0.3 to
0.6."""
_LEAST_GROUP = 10
"""Texts that make a cluster."""
_SLOWEST = 256
"""A centre moves as if it had at most so many texts, and so follows what drifts."""


class Domains:
    """Names domains; its state is a few arrays."""

    def __init__(self, max_clusters: int = 12) -> None:
        self._max_clusters = max_clusters
        self._num_texts = 0
        self._frequencies_B = np.zeros(_NUM_BUCKETS)
        """Texts with a token of the bucket."""
        self._window_WB = np.zeros((0, _NUM_BUCKETS))
        """Bags of the last texts."""
        self._centres_CB = np.zeros((0, _NUM_BUCKETS))
        """Mean of each cluster's texts."""
        self._counts_C = np.zeros(0, np.int64)
        """Texts of each cluster."""

    @property
    def num_clusters(self) -> int:
        """Clusters so far."""
        return len(self._counts_C)

    def name(self, sample: Sample) -> str:
        """Return the domain of a sample, and learn from it if it has no label."""
        return sample.domain or f"auto-{self.assign(sample.token_ids)}"

    def assign(self, token_ids: Sequence[int]) -> int:
        """Return the cluster of a text and move it towards the text."""
        bag_B = _bag(token_ids)
        self._num_texts += 1
        self._frequencies_B += bag_B > 0
        self._window_WB = np.concatenate((self._window_WB[1 - _WINDOW :], bag_B[None]))
        since_first = self._num_texts - _FIRST_GROUPING
        if since_first >= 0 and since_first % _GROUP_EVERY == 0:
            self._group()
        if not self.num_clusters:
            return 0
        text_B = self._weigh(bag_B)
        norms_C = np.linalg.norm(self._centres_CB, axis=1)
        nearest = int((self._centres_CB @ text_B / norms_C).argmax())
        self._move(nearest, text_B, 1)
        return nearest

    def _weigh(self, bags: Vector) -> Vector:
        """Return bags, [..., B], with rare tokens heavier, of length 1."""
        # Above 0 even for what stands in all texts: while there is one domain, all is common.
        weighed = bags * np.log1p(self._num_texts / (1.0 + self._frequencies_B))
        lengths: Vector = np.linalg.norm(weighed, axis=-1, keepdims=True)
        weighed /= np.maximum(lengths, 1e-12)
        return weighed

    def _move(self, cluster: int, mean_B: Vector, count: int) -> None:
        self._counts_C[cluster] += count
        step = min(1.0, count / min(int(self._counts_C[cluster]), _SLOWEST))
        self._centres_CB[cluster] += step * (mean_B - self._centres_CB[cluster])

    def _group(self) -> None:
        """Group the window anew: each group takes the nearest centre left, or opens a cluster.

        So a cluster in which two domains were mixed up is taken by one of them and the other one
        gets its own.
        """
        texts_WB = self._weigh(self._window_WB)
        groups = [g for g in _linked(texts_WB @ texts_WB.T) if len(g) >= _LEAST_GROUP]
        is_taken_C = np.zeros(self.num_clusters, bool)
        for group in sorted(groups, key=len, reverse=True):
            mean_B = texts_WB[group].mean(0)
            cosines_C = np.where(is_taken_C, -1.0, self._cosines(mean_B, len(group)))
            nearest = int(cosines_C.argmax()) if len(cosines_C) else -1
            if nearest >= 0 and cosines_C[nearest] >= _SAME:
                is_taken_C[nearest] = True
                self._move(nearest, mean_B, len(group))
            elif self.num_clusters < self._max_clusters:
                self._centres_CB = np.concatenate((self._centres_CB, mean_B[None]))
                self._counts_C = np.append(self._counts_C, len(group))
                is_taken_C = np.append(is_taken_C, True)

    def _cosines(self, mean_B: Vector, count: int) -> Vector:
        """Return the cosines of a group with all clusters, freed of noise, [C]."""
        counts_C = np.minimum(self._counts_C, _SLOWEST)
        strengths_C = _strength((self._centres_CB**2).sum(-1), counts_C)
        strength = _strength(float(mean_B @ mean_B), count)
        cosines_C: Vector = self._centres_CB @ mean_B / np.sqrt(strength * strengths_C)
        return cosines_C

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the state; `from_arrays` reads it."""
        return {
            "frequencies": self._frequencies_B,
            "window": self._window_WB,
            "centres": self._centres_CB,
            "counts": self._counts_C,
            "limits": np.array([self._num_texts, self._max_clusters], np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> Domains:
        """Read a state.

        Raises:
            ValueError, KeyError: it is none.
        """
        num_texts, max_clusters = map(int, arrays["limits"])
        self = cls(max_clusters)
        counts_C, window_WB = arrays["counts"], arrays["window"]
        for name, shape in (
            ("frequencies", (_NUM_BUCKETS,)),
            ("window", (len(window_WB), _NUM_BUCKETS)),
            ("centres", (len(counts_C), _NUM_BUCKETS)),
        ):
            if arrays[name].shape != shape:
                raise ValueError(f"domains: {name} of {arrays[name].shape}, expected {shape}")
        self._num_texts = num_texts
        self._frequencies_B = arrays["frequencies"].copy()
        self._window_WB, self._counts_C = window_WB.copy(), counts_C.copy()
        self._centres_CB = arrays["centres"].copy()
        return self


def _bag(token_ids: Sequence[int]) -> Vector:
    """Return damped counts by bucket."""
    hashes = np.asarray(token_ids, np.uint64) * np.uint64(_MULTIPLIER) % np.uint64(2**32)
    buckets = hashes * np.uint64(_NUM_BUCKETS) // np.uint64(2**32)
    return np.sqrt(np.bincount(buckets.astype(np.int64), minlength=_NUM_BUCKETS))


def _strength(square: Any, count: Any) -> Any:
    """Return |mean of the domain|^2 from |mean of the texts|^2 and their number, above 0."""
    return np.maximum((count * square - 1.0) / np.maximum(count - 1, 1), 1e-3)


def _linked(dots_WW: Vector) -> list[list[int]]:
    """Return groups by average linkage, joined while two with enough texts are alike."""
    groups = [[i] for i in range(len(dots_WW))]
    sums = dots_WW.copy()
    """[g][h]: dot products between texts of two groups, summed."""
    sizes = np.ones(len(groups))
    while len(groups) > 1:
        means = sums / np.outer(sizes, sizes)
        squares = means.diagonal().copy()
        np.fill_diagonal(means, -np.inf)
        a, b = sorted(map(int, np.unravel_index(means.argmax(), means.shape)))
        if min(sizes[a], sizes[b]) >= _LEAST_GROUP:
            strengths = _strength(squares[[a, b]], sizes[[a, b]])
            if means[a, b] < _SAME * float(np.sqrt(strengths.prod())):
                return groups
        groups[a] += groups.pop(b)
        sums[a] += sums[b]
        sums[:, a] += sums[:, b]
        sums = np.delete(np.delete(sums, b, 0), b, 1)
        sizes[a] += sizes[b]
        sizes = np.delete(sizes, b)
    return groups
