"""Which noise a draw takes: every kind of draw has a lane of the counter to itself.

    lane 0     the target's draws (argmax of logits + noise), and drafts that guess them
    lane 1     the verifier's uniforms (recursive rejection)
    lane 2...  draws of a draft, a lane for each node of a tree
Shape legend: R rows, P positions, K draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from paceline.engine.kernels import philox_uniform_at
from paceline.engine.step import SampleSpec

TARGET_LANE = 0
_VERIFIER_LANE = 1
_FIRST_DRAFT_LANE = 2

NoiseKeys = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def noise_keys(specs: Sequence[SampleSpec]) -> NoiseKeys:
    """Return the seeds, streams and positions of rows, int64 [R] each."""
    return (
        torch.tensor([_signed(spec.sampling.seed) for spec in specs]),
        torch.tensor([spec.stream for spec in specs]),
        torch.tensor([spec.position for spec in specs]),
    )


def draft_lane(node: int, depth: int) -> int:
    """Return the lane of what a draft draws behind a node (-1: the root, at depth 0).

    Unequal for any two nodes of a position, in one tree (by the node) and in trees that begin
    at different tokens (by the depth). Nodes must not share noise: beams and budgets compare
    nodes, so that what is kept of one depends on the noise of another. Nor must rounds: noise
    of a draft that was thrown away has told something of it by what was kept.
    """
    return _FIRST_DRAFT_LANE + (depth << 16 | node + 1)


def verifier_uniforms(
    spec: SampleSpec, num_positions: int, num_draws: int
) -> npt.NDArray[np.float64]:
    """Return what decides about children: uniforms in (0, 1), [P, K].

    Args:
        spec: how the token behind the root is drawn; the others follow position by position.
        num_positions: the depth of the tree and one.
        num_draws: the most children of a node and one.
    """
    seeds, streams, positions = (key.expand(num_positions) for key in noise_keys([spec]))
    draws_PK = torch.arange(num_draws).expand(num_positions, -1)
    lanes = torch.full_like(seeds, _VERIFIER_LANE)
    positions = positions + torch.arange(num_positions)
    return philox_uniform_at(seeds, streams, positions, draws_PK, lanes).numpy()


def _signed(seed: int) -> int:
    """Return the 64-bit pattern of an unsigned seed as a signed number."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
