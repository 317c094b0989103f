"""AdamW whose step can be left and taken up again: its time does not grow with the model.

The step of a stock optimiser over a large draft lasts longer than a micro-step may. Here one is a
generator that yields after so many elements: first it measures the gradient's norm, then it
updates slice by slice. The mathematics is that of torch.optim.AdamW (Loshchilov and Hutter 2019)
behind clip_grad_norm_. learner.py drives it; nothing reads the weights while a step is under way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

_SLICE_ELEMENTS = 1 << 18
"""Some 1 ms of work on one core."""
_BETAS = (0.9, 0.95)
_EPSILON = 1e-8


class NotFiniteError(ArithmeticError):
    """A gradient is infinite or no number; nothing was changed."""


@dataclass(slots=True)
class _Moments:
    first: torch.Tensor
    second: torch.Tensor


class SlicedAdamW:
    """The optimiser of one model."""

    def __init__(self, model: nn.Module, weight_decay: float, max_grad_norm: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._weight_decay = weight_decay
        self._max_grad_norm = max_grad_norm
        self._moments = {
            name: _Moments(torch.zeros_like(p.data).flatten(), torch.zeros_like(p.data).flatten())
            for name, p in self._parameters.items()
        }
        self._num_steps = 0

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Forget the gradient."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float, scale: float) -> Iterator[None]:
        """Take a step with the gradient times `scale`; yields between slices.

        Raises:
            NotFiniteError: before anything is changed.
        """
        square = torch.zeros((), dtype=torch.float64)
        for _, _, gradient in self._slices():
            square += gradient.double().square().sum()
            yield
        norm = float(square.sqrt()) * abs(scale)
        if not norm < float("inf"):
            raise NotFiniteError(f"a gradient of norm {norm}")
        # As clip_grad_norm_ does.
        scale *= min(1.0, self._max_grad_norm / (norm + 1e-6))
        self._num_steps += 1
        for name, part, gradient in self._slices():
            self._update(name, part, gradient * scale, learning_rate)
            yield

    def _slices(self) -> Iterator[tuple[str, slice, torch.Tensor]]:
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            flat = parameter.grad.view(-1)
            for begin in range(0, len(flat), _SLICE_ELEMENTS):
                part = slice(begin, begin + _SLICE_ELEMENTS)
                yield name, part, flat[part]

    def _update(self, name: str, part: slice, gradient: torch.Tensor, rate: float) -> None:
        parameter, moments = self._parameters[name], self._moments[name]
        weights = parameter.data.view(-1)[part]
        if parameter.dim() > 1 and "embed_tokens" not in name:
            weights.mul_(1.0 - rate * self._weight_decay)
        first, second = moments.first[part], moments.second[part]
        first.lerp_(gradient, 1.0 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1.0 - _BETAS[1])
        rise = 1.0 - _BETAS[0] ** self._num_steps
        root = (second / (1.0 - _BETAS[1] ** self._num_steps)).sqrt_().add_(_EPSILON)
        weights.addcdiv_(first, root, value=-rate / rise)

    def reset(self) -> None:
        """Forget all moments."""
        self._num_steps = 0
        for moments in self._moments.values():
            moments.first.zero_()
            moments.second.zero_()

    def state(self) -> tuple[dict[str, torch.Tensor], int]:
        """Return the moments by name, and the number of steps."""
        arrays = {}
        for name, moments in self._moments.items():
            arrays[f"first.{name}"], arrays[f"second.{name}"] = moments.first, moments.second
        return arrays, self._num_steps

    def restore(self, arrays: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Take over a state.

        Raises:
            ValueError, KeyError: it is that of another model.
        """
        for name, moments in self._moments.items():
            for kind, tensor in (("first", moments.first), ("second", moments.second)):
                other = arrays[f"{kind}.{name}"]
                if other.shape != tensor.shape:
                    raise ValueError(f"moments of {name}: {tuple(other.shape)}")
                tensor.copy_(other)
        self._num_steps = num_steps
