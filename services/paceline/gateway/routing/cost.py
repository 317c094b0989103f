"""Routes to the pair with the smallest predicted time to first token, in seconds.

    seconds = wait for prompt work ahead + fetch what the store has + compute the rest
              + hand over and move the KV + one decode step at the decode worker's load

A decode worker may compute the prompt itself. That delays the streams it runs, so the time is
charged once more per running stream, and at least once: a worker kept free of prompt work is
worth that much to the next stream. So short remainders stay on the decode worker and long
ones go to a prefill worker, without a threshold.
"""

from __future__ import annotations

from paceline.domain.cost import StepCost
from paceline.domain.member import Member
from paceline.gateway.routing.base import Decision, FleetLoad, RoutingRequest

_UNKNOWN = StepCost(base_s=0.01, row_s=0.001, token_s=0.001, context_s=0.0)
_DEFAULT_CHUNK = 256


class CostPolicy:
    """Smallest predicted TTFT over all pairs of workers."""

    def decide(self, request: RoutingRequest, fleet: FleetLoad) -> Decision:
        """Evaluate every pair; ties go to the smaller ids."""
        terms: dict[str, float] = {}
        best: tuple[float, Member | None, Member] | None = None
        for decode in fleet.decode:
            for prefill in (None, *fleet.prefill):
                seconds = self._predict(request, fleet, prefill, decode)
                terms[f"{prefill.id if prefill else '-'}>{decode.id}"] = seconds
                if best is None or seconds < best[0]:
                    best = (seconds, prefill, decode)
        assert best is not None, "no decode worker to choose from"
        return Decision(best[2], best[1], best[0], terms)

    def _predict(
        self, request: RoutingRequest, fleet: FleetLoad, prefill: Member | None, decode: Member
    ) -> float:
        running = max(decode.load.num_running, fleet.in_flight.get(decode.id, 0))
        seconds = _wait_s(fleet, prefill or decode)
        if prefill is None:
            seconds += _prompt_s(request, fleet, decode) * (1 + max(1, running))
        else:
            seconds += _prompt_s(request, fleet, prefill) + fleet.hop_s
            seconds += _move_s(fleet, prefill.node_id, decode.node_id, _kv_bytes(request))
        cost = decode.step_cost or _UNKNOWN
        attended = decode.load.context_tokens + request.num_tokens
        step_s = cost.step_s(running + 1, running + 1, attended)
        return seconds + step_s * (1 + decode.load.num_waiting)


def _wait_s(fleet: FleetLoad, worker: Member) -> float:
    """Predict the prompt work ahead; the larger of the worker's report and our own count."""
    ahead = max(worker.load.pending_prefill_tokens, fleet.pending_tokens.get(worker.id, 0))
    cost = worker.step_cost or _UNKNOWN
    return cost.prefill_s(ahead, 0, worker.prefill_chunk_tokens or _DEFAULT_CHUNK)


def _prompt_s(request: RoutingRequest, fleet: FleetLoad, worker: Member) -> float:
    """Predict fetching the stored prefix from the best holder and computing the rest."""
    node, blocks = max(request.holders.items(), key=lambda item: item[1], default=("", 0))
    here = request.holders.get(worker.node_id, 0)
    if here >= blocks:
        node = worker.node_id
    cached = min(blocks * request.block_size, request.num_tokens - 1)
    cost = worker.step_cost or _UNKNOWN
    chunk = worker.prefill_chunk_tokens or _DEFAULT_CHUNK
    fetch_s = _move_s(fleet, node, worker.node_id, blocks * request.block_bytes)
    return fetch_s + cost.prefill_s(request.num_tokens - 1 - cached, cached, chunk)


def _move_s(fleet: FleetLoad, source: str, target: str, num_bytes: int) -> float:
    rate = fleet.near_bytes_per_s if source == target else fleet.far_bytes_per_s
    return num_bytes / rate


def _kv_bytes(request: RoutingRequest) -> int:
    return -(-request.num_tokens // request.block_size) * request.block_bytes
