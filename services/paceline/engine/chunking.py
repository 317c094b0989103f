"""How much of a prompt goes into a step in which others decode.

A stream feels a chunk as one long gap between its tokens. So the chunk is the largest one for
which the step is predicted to take no more than a given multiple of what the decoding rows
take alone; never less than a few tokens, so that prompts go on whatever the prediction says.
scheduler.py calls it, and says whose pace a prompt has to keep; a pure function of values.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.domain.cost import StepCost, StepShape


@dataclass(frozen=True, slots=True)
class StepPace:
    """What decoding streams are promised."""

    cost: StepCost
    """What steps take on this machine."""
    slowdown: float
    """Longest step with prompt work, as a multiple of the same step without."""

    def chunk_tokens(self, step: StepShape, *, start: int, least: int, most: int, unit: int) -> int:
        """Return the next chunk's size for a prompt of which `start` tokens are computed.

        `step` holds the decoding rows and the chunks that are in the step already. The result
        is `most`, or a multiple of `unit` that keeps to the pace, or `least`; a step without
        decoding rows has no pace to keep.
        """
        if step.rows == 0:
            return most
        decoding = StepShape(rows=step.rows, tree_nodes=step.tree_nodes, attended=step.attended)
        limit_s = self.slowdown * self.cost.step_s(decoding)

        def fits(tokens: int) -> bool:
            return self.cost.step_s(step.with_chunk(tokens, start)) <= limit_s

        if fits(most):
            return most
        fitting, too_many = 0, -(-most // unit)
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            if fits(middle * unit):
                fitting = middle
            else:
                too_many = middle
        return min(most, max(least, fitting * unit))
