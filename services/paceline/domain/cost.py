"""The predicted time of one engine step, the unit of every decision in the platform.

engine/cost.py measures the coefficients; workers publish them with their membership; the
gateway's routing evaluates them. Values only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepCost:
    """Linear model of step time: `base + row*rows + token*tokens + context*attended`, seconds.

    `attended` is the context length summed over the computed tokens.
    """

    base_s: float
    row_s: float
    token_s: float
    context_s: float

    def step_s(self, rows: int, tokens: int, attended: int) -> float:
        """Predict one step."""
        return self.base_s + self.row_s * rows + self.token_s * tokens + self.context_s * attended

    def prefill_s(self, tokens: int, cached: int, chunk: int) -> float:
        """Predict computing `tokens` prompt tokens behind `cached` ones in steps of `chunk`."""
        if tokens <= 0:
            return 0.0
        steps = -(-tokens // max(chunk, 1))
        attended = tokens * cached + tokens * (tokens + 1) // 2
        return (
            steps * (self.base_s + self.row_s) + self.token_s * tokens + self.context_s * attended
        )
