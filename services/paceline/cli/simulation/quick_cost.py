"""A step cost that says the same in less time: a run asks for some millions of predictions."""

from __future__ import annotations

from paceline.domain.cost import StepCost, StepShape

_MOST_KEPT = 200_000


class QuickStepCost(StepCost):
    """Keeps what prompts take, and leaves out parts of a step that are not there.

    Not to be changed or compared; equal to the cost it was made of in every prediction.
    """

    def __init__(self, cost: StepCost) -> None:
        super().__init__(cost.base_s, cost.row_s, cost.token_s, cost.context_s, cost.curves)
        kept: dict[tuple[int, int, int], float] = {}
        object.__setattr__(self, "_kept", kept)

    __slots__ = ("_kept",)
    _kept: dict[tuple[int, int, int], float]

    def __reduce__(self) -> tuple[type[QuickStepCost], tuple[StepCost]]:
        plain = StepCost(self.base_s, self.row_s, self.token_s, self.context_s, self.curves)
        return QuickStepCost, (plain,)

    def step_s(self, shape: StepShape) -> float:
        """Predict one step."""
        curves = self.curves
        if curves is None:
            return StepCost.step_s(self, shape)
        seconds = curves.tokens.at(shape.rows + shape.tree_nodes + shape.prefill_tokens)
        seconds += curves.rows.at(shape.rows) + curves.contexts.at(shape.attended)
        seconds += (
            curves.prefill_row_s * shape.prefill_rows
            + curves.prefill_read_s * shape.prefill_context
            + curves.prefill_context_s * shape.prefill_attended
        )
        if shape.tree_nodes or curves.nodes.seconds[0]:
            seconds += curves.nodes.at(shape.tree_nodes)
            seconds += curves.node_context_s * shape.tree_attended
        return seconds

    def prefill_s(self, tokens: int, cached: int, chunk: int) -> float:
        """Predict computing `tokens` prompt tokens behind `cached` ones in steps of `chunk`."""
        key = (tokens, cached, chunk)
        seconds = self._kept.get(key)
        if seconds is None:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            seconds = self._kept[key] = StepCost.prefill_s(self, tokens, cached, chunk)
        return seconds
