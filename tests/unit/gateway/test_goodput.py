"""Which requests count for the SLO, and as what."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from paceline.domain.errors import (
    DeadlineError,
    ExhaustedError,
    InvalidRequestError,
    PermissionDeniedError,
    RequestCancelledError,
    UnavailableError,
)
from paceline.domain.request import FinishReason
from paceline.gateway.context import Output, RequestContext
from paceline.gateway.goodput import Goodput
from paceline.process.metrics import Metrics
from tests.redis_server import RedisServer
from tests.unit.gateway.scripted_worker import breaking, hang
from tests.unit.gateway.stack import Stack, request_for

ARRIVAL_S = 1000.0


def ended(*outputs: tuple[float | None, int]) -> RequestContext:
    """Return a request whose outputs had their first token and so many tokens."""
    ctx = RequestContext(request_for(), "r", ARRIVAL_S, ARRIVAL_S + 100)
    ctx.outputs = [
        Output(i, [5] * count, first_token_s=first, finish_reason=FinishReason.STOP)
        for i, (first, count) in enumerate(outputs)
    ]
    return ctx


@pytest.mark.parametrize(
    ("outputs", "e2e_s", "expected"),
    [
        ([(0.5, 11)], 1.5, "good"),
        ([(0.51, 1)], 0.51, "slow-ttft"),
        ([(0.5, 11)], 1.51, "slow-itl"),
        ([(0.5, 1)], 9.0, "good"),  # One token has no gap.
        ([(0.5, 11), (0.6, 11)], 1.5, "slow-ttft"),
        ([(None, 0)], 0.4, "good"),  # Ended at once, by a stop string.
        ([(None, 0)], 0.6, "slow-ttft"),
    ],
)
def test_an_answer_is_judged_by_both_targets(
    outputs: list[tuple[float | None, int]], e2e_s: float, expected: str
) -> None:
    goodput = Goodput(Metrics("gateway"), ttft_target_s=0.5, itl_target_s=0.1 + 1e-9)
    assert goodput.result(ended(*outputs), None, ARRIVAL_S + e2e_s) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UnavailableError("x"), "failed"),
        (ExhaustedError("x"), "failed"),
        (DeadlineError("x"), "failed"),
        (ValueError("a bug"), "failed"),
        (InvalidRequestError("n", "x"), None),
        (PermissionDeniedError("x"), None),
        (RequestCancelledError("x"), None),
        (asyncio.CancelledError(), None),
        (GeneratorExit(), None),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_clients_do_is_no_failure(error: BaseException, expected: str | None) -> None:
    goodput = Goodput(Metrics("gateway"), ttft_target_s=1, itl_target_s=1)
    assert goodput.result(ended(), error, ARRIVAL_S) == expected


async def test_every_request_is_counted_once(redis: RedisServer) -> None:
    async with Stack(redis.url, ttft_target_s=60, itl_target_s=60, max_in_flight=1) as stack:

        def value(name: str, **labels: str) -> float | None:
            return stack.metrics.registry.get_sample_value(f"paceline_{name}", labels)

        assert value("ready_workers", pool="decode") == 0
        await stack.add()
        assert value("ready_workers", pool="decode") == 1
        await stack.generate(request_for())
        await stack.refused(request_for(n=99))
        stack.stage.decode("r", breaking(1, hang))
        call = stack.call(request_for(request_id="r"))
        await call.read()
        refusal = await stack.refused(request_for())
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        call.cancel()
        await stack.until_at_rest()
        assert value("requests_received_total") == 4
        reasons = {
            reason: value("requests_finished_total", finish_reason=reason)
            for reason in ("stop", "length", "cancelled", "error")
        }
        assert reasons == {"stop": 0, "length": 1, "cancelled": 1, "error": 2}
        results = {
            result: value("slo_requests_total", result=result)
            for result in ("good", "slow-ttft", "slow-itl", "failed")
        }
        assert results == {"good": 1, "slow-ttft": 0, "slow-itl": 0, "failed": 1}
        assert value("slo_target_seconds", target="ttft") == 60
        assert value("request_prompt_tokens_sum") == 6
        assert value("request_output_tokens_sum") == 9, "8, and the one that was read"
        assert value("request_output_tokens_count") == 2
