"""Predicted times of one step with any number of draft nodes, computed once and looked up.

Asking the step cost takes microseconds, and the controller asks some hundred times per step.
"""

from __future__ import annotations

from dataclasses import replace

from paceline.domain.cost import StepCost, StepShape

_CONTEXT_STEP = 512
"""Contexts that differ by less are the same step."""
_MAX_CURVES = 256


class NodeCurve:
    """Seconds of one step over its number of draft nodes."""

    __slots__ = ("_cost", "_seconds", "_shape", "rows")

    def __init__(self, cost: StepCost, shape: StepShape) -> None:
        self._cost, self._shape = cost, shape
        self.rows = shape.rows
        self._seconds: list[float] = []

    def at(self, num_nodes: int) -> float:
        """Return the seconds."""
        while len(self._seconds) <= num_nodes:
            nodes = len(self._seconds)
            context = self._shape.attended // max(1, self._shape.rows)
            shape = replace(self._shape, tree_nodes=nodes, tree_attended=nodes * context)
            self._seconds.append(self._cost.step_s(shape))
        return self._seconds[num_nodes]

    def slope(self, num_nodes: int) -> float:
        """Return the seconds that one node more takes, about there."""
        return (self.at(2 * num_nodes) - self.at(num_nodes)) / num_nodes


class StepTimes:
    """Node curves of the steps that occur."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._curves: dict[StepShape, NodeCurve] = {}

    def of(self, step: StepShape) -> NodeCurve:
        """Return the curve of a step without drafts, or of one nearly like it."""
        near = replace(
            step,
            attended=_rounded(step.attended),
            prefill_context=_rounded(step.prefill_context),
            prefill_attended=_rounded(step.prefill_attended),
        )
        curve = self._curves.get(near)
        if curve is None:
            if len(self._curves) == _MAX_CURVES:
                self._curves.clear()
            curve = self._curves[near] = NodeCurve(self._cost, near)
        return curve


def _rounded(tokens: int) -> int:
    return tokens // _CONTEXT_STEP * _CONTEXT_STEP + _CONTEXT_STEP // 2 if tokens else 0
