"""The predicted time of one engine step, the unit of every decision in the platform.

engine/cost.py measures it; workers publish it with their membership; the gateway's routing and
the engine's scheduler evaluate it. Values only.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one step computes.

    Contexts ("attended") are summed over tokens: a chunk of tokens [start, start + n) attends
    to (start + 1) + ... + (start + n).
    """

    rows: int = 0
    """Sequences that decode: one token each, and drawn from."""
    tree_nodes: int = 0
    """Draft tokens computed with the decoding rows, and drawn from as well."""
    tree_attended: int = 0
    """Context of those rows, summed over their draft tokens."""
    attended: int = 0
    """Context of the decoding rows' tokens."""
    prefill_rows: int = 0
    """Sequences that compute a chunk of their prompt."""
    prefill_tokens: int = 0
    """Tokens of those chunks."""
    prefill_context: int = 0
    """Length of those sequences behind their chunks: what is read of their KV."""
    prefill_attended: int = 0
    """Context of the chunks' tokens."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed in all."""
        return self.rows + self.tree_nodes + self.prefill_tokens

    def with_chunk(self, tokens: int, start: int) -> StepShape:
        """Return the shape with one more chunk, of `tokens` behind `start` computed ones."""
        return replace(
            self,
            prefill_rows=self.prefill_rows + 1,
            prefill_tokens=self.prefill_tokens + tokens,
            prefill_context=self.prefill_context + start + tokens,
            prefill_attended=self.prefill_attended + attended_by_chunk(tokens, start),
        )


def attended_by_chunk(tokens: int, start: int) -> int:
    """Return the context of a run of tokens, summed over them."""
    return tokens * start + tokens * (tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds over a count, linear between points and behind them like their last segment."""

    counts: tuple[int, ...]
    """Rising."""
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.counts or len(self.counts) != len(self.seconds):
            raise ValueError(f"{len(self.counts)} counts, {len(self.seconds)} times")
        if any(a >= b for a, b in pairwise(self.counts)):
            raise ValueError(f"counts do not rise: {self.counts}")

    def at(self, count: int) -> float:
        """Return the seconds; in front of the first point those of the first."""
        counts, seconds = self.counts, self.seconds
        if count <= counts[0] or len(counts) == 1:
            return seconds[0]
        i = min(bisect_right(counts, count), len(counts) - 1)
        slope = (seconds[i] - seconds[i - 1]) / (counts[i] - counts[i - 1])
        return seconds[i - 1] + slope * (count - counts[i - 1])


NO_CURVE = Curve((0,), (0.0,))


@dataclass(frozen=True, slots=True)
class StepCurves:
    """Step time by parts: all tokens + decoding rows + attention of rows and of chunks.

    The curve over tokens is flat while reading the weights takes longer than computing, and
    rises behind; where tokens are computed in tiles, it follows the tiles.
    """

    tokens: Curve
    """What a step takes for the tokens it computes, drawing and attention aside."""
    rows: Curve
    """What decoding rows add: drawing, and what attention takes per row."""
    contexts: Curve
    """Over the context of decoding rows: what lies in a cache is read faster than the rest."""
    prefill_row_s: float
    """Seconds per chunk."""
    prefill_read_s: float
    """Seconds per token of KV that chunks read."""
    prefill_context_s: float
    """Seconds per token of context of chunks."""
    nodes: Curve = NO_CURVE
    """What draft tokens add beyond being tokens: drawing, mostly."""
    node_context_s: float = 0.0
    """Seconds per token of context of draft tokens."""

    def step_s(self, shape: StepShape) -> float:
        """Predict one step."""
        return (
            self.tokens.at(shape.num_tokens)
            + self.rows.at(shape.rows)
            + self.contexts.at(shape.attended)
            + self.prefill_row_s * shape.prefill_rows
            + self.prefill_read_s * shape.prefill_context
            + self.prefill_context_s * shape.prefill_attended
            + self.nodes.at(shape.tree_nodes)
            + self.node_context_s * shape.tree_attended
        )


@dataclass(frozen=True, slots=True)
class StepCost:
    """Step time in seconds: by curves where they were measured, else linear.

    The linear form is `base + row*rows + token*tokens + context*attended`; it is also what
    members of a version without curves go by.
    """

    base_s: float
    row_s: float
    token_s: float
    context_s: float
    curves: StepCurves | None = None
    floor_s: float = 0.0
    """No step takes less."""

    def step_s(self, shape: StepShape) -> float:
        """Predict one step."""
        # In this order, so that what is no number stays none.
        return max(self._computed_s(shape), self.floor_s)

    def _computed_s(self, shape: StepShape) -> float:
        if self.curves is not None:
            return self.curves.step_s(shape)
        rows = shape.rows + shape.prefill_rows
        attended = shape.attended + shape.tree_attended + shape.prefill_attended
        return (
            self.base_s
            + self.row_s * rows
            + self.token_s * shape.num_tokens
            + self.context_s * attended
        )

    def prefill_s(self, tokens: int, cached: int, chunk: int) -> float:
        """Predict computing `tokens` prompt tokens behind `cached` ones in steps of `chunk`."""
        if tokens <= 0:
            return 0.0
        chunk = max(chunk, 1)
        num_full, rest = divmod(tokens, chunk)
        seconds = num_full * self.step_s(StepShape(prefill_rows=1, prefill_tokens=chunk))
        num_read = num_full * cached + chunk * num_full * (num_full + 1) // 2
        if rest:
            seconds += self.step_s(StepShape(prefill_rows=1, prefill_tokens=rest))
            num_read += cached + tokens
        # Attention depends on sums over the steps alone.
        attended = attended_by_chunk(tokens, cached)
        if self.curves is None:
            return seconds + self.context_s * attended
        curves = self.curves
        return seconds + curves.prefill_read_s * num_read + curves.prefill_context_s * attended

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StepCost:
        """Read plain JSON values of `dataclasses.asdict`; unknown keys are ignored.

        Raises:
            KeyError, TypeError, ValueError: the data is not a step cost.
        """
        curves = data.get("curves")
        return cls(
            base_s=float(data["base_s"]),
            row_s=float(data["row_s"]),
            token_s=float(data["token_s"]),
            context_s=float(data["context_s"]),
            curves=None if curves is None else _curves_from_json(curves),
            floor_s=float(data.get("floor_s", 0.0)),
        )


def _curves_from_json(data: dict[str, Any]) -> StepCurves:
    def curve(name: str) -> Curve:
        points = data[name]
        return Curve(tuple(map(int, points["counts"])), tuple(map(float, points["seconds"])))

    return StepCurves(
        tokens=curve("tokens"),
        rows=curve("rows"),
        contexts=curve("contexts"),
        prefill_row_s=float(data["prefill_row_s"]),
        prefill_read_s=float(data["prefill_read_s"]),
        prefill_context_s=float(data["prefill_context_s"]),
        # Members of a version without drafts do not tell.
        nodes=curve("nodes") if "nodes" in data else NO_CURVE,
        node_context_s=float(data.get("node_context_s", 0.0)),
    )
