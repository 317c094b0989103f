"""Counts how requests end: why, and whether they were as good as the operator wants.

A good request was answered to its end with first token and mean gap between tokens within the
targets. What clients cancel or get wrong themselves says nothing of the service and is left out.
pipeline.py calls this once per request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from paceline.domain.errors import (
    DeadlineError,
    ExhaustedError,
    InternalError,
    PacelineError,
    RequestCancelledError,
    UnavailableError,
)
from paceline.domain.request import FinishReason
from paceline.gateway.context import Output, RequestContext
from paceline.process.metrics import Metrics

_OUR_FAULTS = (UnavailableError, ExhaustedError, DeadlineError, InternalError)
_CANCELS = (asyncio.CancelledError, GeneratorExit, RequestCancelledError)


class Goodput:
    """The counters of ended requests."""

    def __init__(self, metrics: Metrics, *, ttft_target_s: float, itl_target_s: float) -> None:
        self._metrics = metrics
        self._ttft_target_s = ttft_target_s
        self._itl_target_s = itl_target_s
        metrics.slo_target_seconds.labels("ttft").set(ttft_target_s)
        metrics.slo_target_seconds.labels("itl").set(itl_target_s)

    @contextmanager
    def counted(self, ctx: RequestContext) -> Iterator[None]:
        """Count a request as received, and its end however it comes."""
        self._metrics.requests_received.inc()
        try:
            yield
        except BaseException as error:
            # A client that leaves behind its last token has been served.
            self._note_end(ctx, None if ctx.is_finished else error)
            raise
        else:
            self._note_end(ctx, None)

    def _note_end(self, ctx: RequestContext, error: BaseException | None) -> None:
        metrics = self._metrics
        metrics.requests_finished.labels(_finish_reason(ctx, error)).inc()
        if ctx.num_output_tokens:
            metrics.request_output_tokens.observe(ctx.num_output_tokens)
        result = self.result(ctx, error, time.monotonic())
        if result is not None:
            metrics.slo_requests.labels(result).inc()

    def result(self, ctx: RequestContext, error: BaseException | None, now_s: float) -> str | None:
        """Return how a request that ends now is counted; None where it is not."""
        if error is not None:
            is_ours = isinstance(error, _OUR_FAULTS) or not isinstance(
                error, (PacelineError, *_CANCELS)
            )
            return "failed" if is_ours else None
        e2e_s = now_s - ctx.arrival_s
        if any((o.first_token_s or e2e_s) > self._ttft_target_s for o in ctx.outputs):
            return "slow-ttft"
        if any(_mean_gap_s(o, e2e_s) > self._itl_target_s for o in ctx.outputs):
            return "slow-itl"
        return "good"


def _finish_reason(ctx: RequestContext, error: BaseException | None) -> str:
    if isinstance(error, _CANCELS):
        return "cancelled"
    if error is not None:
        return "error"
    is_cut = any(output.finish_reason is FinishReason.LENGTH for output in ctx.outputs)
    return "length" if is_cut else "stop"


def _mean_gap_s(output: Output, e2e_s: float) -> float:
    """Return seconds per token behind the first; an output that ended earlier looks slower."""
    num_gaps = len(output.token_ids) - 1
    return (e2e_s - (output.first_token_s or e2e_s)) / num_gaps if num_gaps > 0 else 0.0
