"""Which workers end first when a pool shrinks: those whose loss costs least, in seconds. Pure.

A worker that leaves hands its streams over; KV of whole blocks stays in the store. What its loss
costs is what others then have to do, and streams have to wait:

    streams   context that has to move or, where the store lost it, to be computed again: counted
              as computing, by the step cost, since that bounds both
    prompts   pending prompt tokens, begun anew elsewhere: by the step cost
    queue     one step per request that has to queue again

Workers that drain already come first: they cost nothing more.
"""

from __future__ import annotations

import math

from paceline.autoscaler.values import Pool, Replica, Worker
from paceline.domain.cost import StepShape

_TOKEN_S = 1e-4
"""Per token where no step cost is known: only the order matters, and any constant keeps it."""


def loss_s(worker: Worker, replica: Replica | None) -> float:
    """Return the seconds of work that ending a worker makes."""
    if worker.is_draining:
        return 0.0
    queued = worker.num_running + worker.num_waiting
    tokens = worker.context_tokens + worker.pending_prefill_tokens
    if replica is None:
        return _TOKEN_S * tokens + _TOKEN_S * queued
    cost = replica.step_cost
    streams = max(1, worker.num_running)
    # Streams are computed one by one: attention grows with each one's context, not with the sum.
    each = worker.context_tokens // streams
    seconds = streams * cost.prefill_s(each, 0, replica.chunk_tokens) if each else 0.0
    seconds += cost.prefill_s(worker.pending_prefill_tokens, 0, replica.chunk_tokens)
    seconds += queued * cost.step_s(StepShape(rows=1))
    return seconds if math.isfinite(seconds) and seconds >= 0 else math.inf


def choose_victims(pool: Pool, num: int) -> tuple[str, ...]:
    """Return the workers to end when `num` replicas leave, cheapest loss first.

    Replicas that still start have no id; whoever carries the decision out ends them first, so
    only what is beyond them is named, and draining workers in front. Among equals the younger
    one goes: caches of the older are warmer.
    """
    draining = [worker for worker in pool.workers if worker.is_draining]
    staying = [worker for worker in pool.workers if not worker.is_draining]
    ranked = sorted(staying, key=lambda w: (loss_s(w, pool.replica), w.age_s, w.id))
    num_named = max(0, num - pool.starting)
    return tuple(w.id for w in (*sorted(draining, key=lambda w: w.id), *ranked[:num_named]))
