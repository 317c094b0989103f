"""Routes to the pair with the smallest predicted time to first token, in seconds.

    seconds = wait for prompt work ahead + fetch what the store has + compute the rest
              + hand over and move the KV + one decode step at the decode worker's load

A decode worker may compute the prompt itself. That delays the streams it runs, so the time is
charged once more per running stream, and at least once: a worker kept free of prompt work is
worth that much to the next stream. So short remainders stay on the decode worker and long
ones go to a prefill worker, without a threshold.

A decode worker that has a drafter for text like the request's needs fewer steps for its answer.
What that saves counts for it, in seconds like all the rest, and within a bound:

    saved = step of the worker alone * min(10 % of the tokens that may come, 8)
"""

from __future__ import annotations

import math

from paceline.domain.cost import StepCost, StepShape
from paceline.domain.member import Member
from paceline.gateway.routing.base import Decision, FleetLoad, RoutingRequest

_UNKNOWN = StepCost(base_s=0.01, row_s=0.001, token_s=0.001, context_s=0.0)
_DEFAULT_CHUNK = 256

_SAVED_RATIO = 0.1
"""Share of decode steps that a fitting drafter saves. Where half of what is drafted is accepted,
0.05 more make a tenth more tokens per pass, 1 / (1 - acceptance); less is no reason to make one."""
_MOST_SAVED_STEPS = 8
"""Answers are shorter than they may be, and engines draft well without: so no request waits longer
than these steps of an idle worker for a drafter."""


class CostPolicy:
    """Smallest predicted TTFT over all pairs of workers."""

    def decide(self, request: RoutingRequest, fleet: FleetLoad) -> Decision:
        """Evaluate every pair; ties go to decoding alone, then to the smaller ids."""
        terms: dict[str, float] = {}
        pairs = []
        for decode in fleet.decode:
            saved_s = _saved_s(request, decode)
            # Without nodes at both ends the KV would not get across.
            sharing = [p for p in fleet.prefill if p.node_id and decode.node_id]
            for prefill in (None, *sharing):
                seconds = self._predict(request, fleet, prefill, decode)
                name = prefill.id if prefill else ""
                terms[f"{name or '-'}>{decode.id}"] = seconds
                pairs.append((seconds - saved_s, name, decode.id, prefill, decode, saved_s))
        assert pairs, "no decode worker to choose from"
        _, name, _, prefill, decode, saved_s = min(pairs, key=lambda pair: pair[:3])
        return Decision(decode, prefill, terms[f"{name or '-'}>{decode.id}"], terms, saved_s)

    def _predict(
        self, request: RoutingRequest, fleet: FleetLoad, prefill: Member | None, decode: Member
    ) -> float:
        running = max(decode.load.num_running, fleet.in_flight.get(decode.id, 0))
        first = prefill or decode
        seconds = _wait_s(fleet, first) + _fetch_s(request, fleet, first)
        if prefill is None:
            seconds += _compute_s(request, decode) * (1 + max(1, running))
        else:
            seconds += _compute_s(request, prefill) + fleet.hop_s
            seconds += _hand_over_s(request, fleet, prefill, decode)
        cost = decode.step_cost or _UNKNOWN
        attended = decode.load.context_tokens + request.num_tokens
        step_s = cost.step_s(StepShape(rows=running + 1, attended=attended))
        seconds += step_s * (1 + decode.load.num_waiting)
        # A worker whose numbers are no numbers is the last to be chosen.
        return seconds if math.isfinite(seconds) else math.inf


def _saved_s(request: RoutingRequest, decode: Member) -> float:
    """Return what a worker's drafters save of the decode; the same at any load."""
    if request.fitting_drafters.isdisjoint(decode.drafters):
        return 0.0
    cost = decode.step_cost or _UNKNOWN
    step_s = cost.step_s(StepShape(rows=1, attended=request.num_tokens))
    saved_s = step_s * min(_SAVED_RATIO * request.max_tokens, _MOST_SAVED_STEPS)
    return saved_s if math.isfinite(saved_s) else 0.0


def _wait_s(fleet: FleetLoad, worker: Member) -> float:
    """Predict the prompt work ahead; the larger of the worker's report and our own count."""
    ahead = max(worker.load.pending_prefill_tokens, fleet.pending_tokens.get(worker.id, 0))
    cost = worker.step_cost or _UNKNOWN
    return cost.prefill_s(ahead, 0, worker.prefill_chunk_tokens or _DEFAULT_CHUNK)


def _fetch_s(request: RoutingRequest, fleet: FleetLoad, worker: Member) -> float:
    """Predict fetching the longest stored prefix, from the worker's own node while it has it."""
    near = request.holders.get(worker.node_id, 0)
    far = _stored_blocks(request, worker) - near
    return _move_s(request, fleet, near, far)


def _compute_s(request: RoutingRequest, worker: Member) -> float:
    """Predict computing what is not stored; the last token is part of the first decode step."""
    stored = _stored_blocks(request, worker) * request.block_size
    cached = min(stored, request.num_tokens - 1)
    cost = worker.step_cost or _UNKNOWN
    chunk = worker.prefill_chunk_tokens or _DEFAULT_CHUNK
    return cost.prefill_s(request.num_tokens - 1 - cached, cached, chunk)


def _hand_over_s(
    request: RoutingRequest, fleet: FleetLoad, prefill: Member, decode: Member
) -> float:
    """Predict bringing the prompt's KV to the decode worker, less what its node has already."""
    blocks = -(-request.num_tokens // request.block_size)
    near = request.holders.get(decode.node_id, 0)
    if prefill.node_id == decode.node_id:
        near = blocks
    return _move_s(request, fleet, near, max(0, blocks - near))


def _stored_blocks(request: RoutingRequest, worker: Member) -> int:
    """Return how many leading blocks the worker can have from the store."""
    return max(request.holders.values(), default=0) if worker.node_id else 0


def _move_s(request: RoutingRequest, fleet: FleetLoad, near: int, far: int) -> float:
    """Predict moving so many blocks on one node and between nodes."""
    seconds = near * request.block_bytes / fleet.near_bytes_per_s
    return seconds + far * request.block_bytes / fleet.far_bytes_per_s
