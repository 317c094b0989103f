"""What share of a load a fleet without any queue would serve within the SLO.

A prompt that takes longer than the SLO on an idle replica misses it however many replicas there
are; a goal above this share asks for what no scaling policy can do. Prefixes come from one node's
store: a fleet of more nodes keeps more of them, so that it may do better by a little.
"""

from __future__ import annotations

from paceline.cli.simulation.profiles import Profile
from paceline.cli.simulation.store import NodeStore, prefix_keys
from paceline.cli.simulation.traces import Arrival
from paceline.domain.cost import StepShape


def reachable_ratio(
    load: tuple[Arrival, ...],
    profile: Profile,
    slo_ttft_s: float,
    slo_itl_s: float,
    emitted_per_step: float = 1.0,
) -> float:
    """Return the share, each request alone."""
    store = NodeStore(profile.store_tokens)
    num_within = 0
    for arrival in load:
        keys = prefix_keys(arrival)
        leading = store.num_leading(keys)
        store.put(keys, arrival.block_tokens)
        store.read(keys)
        cached = min(leading * arrival.block_tokens, arrival.prompt_tokens - 1)
        ttft_s, itl_s = _alone(arrival, cached, profile, emitted_per_step)
        num_within += ttft_s <= slo_ttft_s and itl_s <= slo_itl_s
    return num_within / len(load)


def _alone(
    arrival: Arrival, cached: int, profile: Profile, emitted_per_step: float
) -> tuple[float, float]:
    replica, tokens = profile.replica, arrival.prompt_tokens
    cost = replica.step_cost
    move_s = profile.kv_token_bytes / profile.near_bytes_per_s
    compute_s = cost.prefill_s(tokens - 1 - cached, cached, replica.chunk_tokens)
    step_s = cost.step_s(StepShape(rows=1, attended=tokens))
    # On one worker, without handing over, where that is faster.
    ttft_s = cached * move_s + compute_s + step_s
    context = tokens + arrival.output_tokens // 2
    itl_s = cost.step_s(StepShape(rows=1, attended=context)) / emitted_per_step
    return ttft_s, itl_s if arrival.output_tokens > 1 else 0.0
