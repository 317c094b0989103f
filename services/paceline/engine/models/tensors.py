"""Hands out a checkpoint's tensors, checked, to whatever model is made of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from paceline.engine.models.config import UnsupportedModelError

_SERVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Plain numbers; narrower ones need scales that only their format knows."""


class TensorStore:
    """Hands out a checkpoint's tensors once each, checked and cast.

    The tensors are views of the mapped files, so nothing is read before it is taken, and what
    needs neither cast nor fusion stays the file's own memory.
    """

    def __init__(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        dtype: torch.dtype | None,
        device: str = "cpu",
    ) -> None:
        """Take over the tensors; without a dtype they are handed out as the file has them."""
        self._tensors: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            if name in self._tensors:
                raise UnsupportedModelError(f"tensor {name} is in the checkpoint twice")
            self._tensors[name] = tensor
        self._dtype = dtype
        self._device = device

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Remove and return a tensor.

        Raises:
            UnsupportedModelError: it is missing, quantised, or has another shape.
        """
        tensor = self._pop(name, shape)
        return tensor.to(self._device, self._dtype or tensor.dtype)

    def fuse(self, names: list[str], sizes: list[int], *tail: int) -> torch.Tensor:
        """Remove several tensors and return them joined along their first dimension."""
        fused = torch.empty(sum(sizes), *tail, dtype=self._dtype, device=self._device)
        for name, part in zip(names, fused.split(sizes), strict=True):
            part.copy_(self._pop(name, tuple(part.shape)))
        return fused

    def _pop(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise UnsupportedModelError(f"tensor {name} is missing from the checkpoint")
        if tuple(tensor.shape) != shape:
            raise UnsupportedModelError(f"tensor {name}: {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype not in _SERVED_DTYPES:
            raise UnsupportedModelError(f"tensor {name}: {tensor.dtype} is not supported")
        return tensor

    def drop(self, name: str) -> None:
        """Ignore a tensor."""
        self._tensors.pop(name, None)

    def check_empty(self) -> None:
        """Refuse a checkpoint with tensors that nothing used, rotary buffers excepted."""
        left = sorted(n for n in self._tensors if not n.endswith("rotary_emb.inv_freq"))
        if left:
            raise UnsupportedModelError(f"unexpected tensors: {', '.join(left[:4])}")
