"""Keeps a learner from ruining its draft: copies of good weights, and when to go back to them.

Traffic cannot be trusted to be learnable. One bad batch is skipped by the learner; a loss far above
its running median for several steps in a row, or a weight that is no number, brings the last good
weights back. A copy counts as good once no spike followed it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from statistics import median

import torch
from torch import nn

_HISTORY = 64
"""Steps whose losses the median is of."""
_LEAST_HISTORY = 8
"""Steps before which no loss counts as a spike."""
_SLICE_ELEMENTS = 1 << 20
"""Copied at a time; some 1 ms."""


class Guard:
    """Watches one model."""

    def __init__(self, model: nn.Module, spike_ratio: float, spike_steps: int) -> None:
        self._model = model
        self._spike_ratio = spike_ratio
        self._spike_steps = spike_steps
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._num_spikes = 0
        self._good = {name: p.data.clone() for name, p in model.named_parameters()}

    def note(self, loss: float) -> bool:
        """Note the mean loss of a step; tell whether it is time to go back."""
        is_known = len(self._losses) >= _LEAST_HISTORY
        if is_known and loss > self._spike_ratio * median(self._losses):
            self._num_spikes += 1
            return self._num_spikes >= self._spike_steps
        self._num_spikes = 0
        self._losses.append(loss)
        return False

    @torch.no_grad()
    def keep(self) -> Iterator[None]:
        """Copy the weights if the last loss was no spike; yields between slices."""
        if self._num_spikes or not self.is_sound():
            return
        for name, parameter in self._model.named_parameters():
            kept, flat = self._good[name].view(-1), parameter.data.view(-1)
            for begin in range(0, len(flat), _SLICE_ELEMENTS):
                part = slice(begin, begin + _SLICE_ELEMENTS)
                kept[part] = flat[part]
                yield

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the last good weights back; losses are judged anew, as traffic may have changed."""
        for name, parameter in self._model.named_parameters():
            parameter.data.copy_(self._good[name])
        self._losses.clear()
        self._num_spikes = 0

    @torch.no_grad()
    def is_sound(self) -> bool:
        """Tell whether every weight is a finite number."""
        # A sum is finite only if all are; no weight is so large that finite ones overflow.
        return all(bool(p.data.sum().isfinite()) for p in self._model.parameters())

    def reset(self) -> None:
        """Take the weights as they are now for good ones, and forget the losses."""
        self._losses.clear()
        self._num_spikes = 0
        for name, parameter in self._model.named_parameters():
            self._good[name].copy_(parameter.data)
