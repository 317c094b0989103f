"""What the engine says about a request after a step, made from the request's state.

engine.py decides when; prefix hits are told once, with the first report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.domain.request import TokenChunk
from paceline.engine.events import EngineLoad, LearningsEvent, OutputEvent
from paceline.engine.request import Request
from paceline.engine.scheduler import Scheduler
from paceline.engine.spec.report import SpeculationReport

if TYPE_CHECKING:
    from paceline.engine.spec.capture import Capture
    from paceline.engine.spec.speculator import Speculator


def step_report(request: Request, chunks: tuple[TokenChunk, ...]) -> OutputEvent:
    """Return what a step brought for a request."""
    local, store = _hits(request)
    rounds, request.rounds = tuple(request.rounds), []
    return OutputEvent(
        request_id=request.spec.request_id,
        chunks=chunks,
        local_hit_tokens=local,
        store_hit_tokens=store,
        computed_tokens=request.num_prompt_computed,
        is_finished=request.is_finished and not request.is_prefill_only,
        rounds=rounds,
    )


def end_report(request: Request) -> OutputEvent:
    """Return the end of a request that ended outside a step."""
    local, store = _hits(request)
    return OutputEvent(
        request_id=request.spec.request_id,
        local_hit_tokens=local,
        store_hit_tokens=store,
        computed_tokens=max(len(request.spec.prompt_token_ids) - 1, 0),
        is_finished=True,
    )


def learnings_report(
    speculator: Speculator | None, capture: Capture | None
) -> list[LearningsEvent]:
    """Return what there is to train and to judge drafts with since the last step."""
    outcomes = () if speculator is None else tuple(speculator.take_outcomes())
    if capture is not None and capture.has_samples:
        samples, capture_s = capture.take()
        return [LearningsEvent(samples, outcomes, capture_s)]
    return [LearningsEvent(outcomes=outcomes)] if outcomes else []


def load_report(
    scheduler: Scheduler,
    *,
    last_step_s: float,
    num_steps: int,
    speculation: SpeculationReport | None = None,
) -> EngineLoad:
    """Return how busy an engine is."""
    s = scheduler
    pending = sum(max(0, q.num_remaining - 1) for q in [*s.waiting, *s.running])
    return EngineLoad(
        num_waiting=len(s.waiting),
        num_running=len(s.running),
        pending_prefill_tokens=pending,
        free_blocks=s.pool.num_available,
        total_blocks=s.pool.num_pages,
        context_tokens=sum(q.num_computed for q in s.running),
        last_step_s=last_step_s,
        num_preemptions=s.num_preemptions,
        num_steps=num_steps,
        num_evictions=s.pool.num_evictions,
        cached_blocks=s.pool.num_cached,
        speculation=speculation,
    )


def _hits(request: Request) -> tuple[int, int]:
    """Return the tokens found in the own cache and in the store, the first time only."""
    if request.has_reported_hits:
        return 0, 0
    request.has_reported_hits = True
    return request.local_hit_tokens, request.store_hit_tokens
