"""The way of a request through the gateway, step by step. The page to read first.

    authenticate > validate > admit > tokenise > lookup > park > route > prefill > decode > respond

Each step is a file in steps/ (authentication in auth.py, admission in admission.py, the place to
wait for workers in parking.py) and works on one RequestContext. server.py calls this for every
Generate.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from functools import partial

from paceline.domain.errors import NotFoundError
from paceline.domain.member import ModelCard, Role
from paceline.gateway.admission import Admission
from paceline.gateway.auth import Tenant
from paceline.gateway.context import RequestContext
from paceline.gateway.fleet import FleetView
from paceline.gateway.goodput import Goodput
from paceline.gateway.parking import Parking
from paceline.gateway.settings import GatewaySettings
from paceline.gateway.steps.decode import DecodeStep
from paceline.gateway.steps.lookup import LookupStep
from paceline.gateway.steps.prefill import PrefillStep
from paceline.gateway.steps.respond import Responder
from paceline.gateway.steps.route import RouteStep
from paceline.gateway.steps.tokenise import TokeniseStep
from paceline.gateway.steps.validate import (
    Limits,
    check_against_model,
    check_request,
    check_speculation,
)
from paceline.gateway.tokenizer import ModelTokenizer
from paceline.gateway.trace import note_request
from paceline.process.metrics import Metrics
from paceline.v1 import inference_pb2

logger = logging.getLogger(__name__)


class Pipeline:
    """The steps, wired once per process."""

    def __init__(
        self,
        settings: GatewaySettings,
        fleet: FleetView,
        tokenizer: ModelTokenizer,
        tokenise: TokeniseStep,
        lookup: LookupStep,
        parking: Parking,
        route: RouteStep,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._limits = Limits(max_outputs=settings.max_outputs)
        self._fleet = fleet
        self._tokenizer = tokenizer
        self._metrics = metrics
        self.admission = Admission(settings.max_in_flight)
        self.parking = parking
        metrics.requests_running.set_function(lambda: self.admission.num_running)
        for pool, role in (("prefill", Role.PREFILL), ("decode", Role.DECODE)):
            metrics.ready_workers.labels(pool).set_function(partial(fleet.num_ready, role))
        self._goodput = Goodput(
            metrics, ttft_target_s=settings.ttft_target_s, itl_target_s=settings.itl_target_s
        )
        metrics.requests_parked.set_function(lambda: parking.num_parked)
        self._tokenise = tokenise
        self._lookup = lookup
        self._route = route
        self._prefill = PrefillStep(fleet, lookup, route, settings.max_attempts)
        self._decode = DecodeStep(fleet, lookup, route, metrics, settings.max_attempts)

    async def generate(
        self, ctx: RequestContext, tenant: Tenant
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Answer one request; closing the iterator cancels it everywhere.

        Raises:
            PacelineError: why it could not be answered, or not to its end.
        """
        ctx.tenant, ctx.may_train = tenant.name, tenant.allow_training
        with (
            self._goodput.counted(ctx),
            _logged(ctx),
            self.admission.admit(tenant.name, ctx.request_id),
        ):
            check_request(ctx.request, self._limits)
            await self._prepare(ctx, tenant)
            await self.parking.wait(lambda: self._fleet.is_served, ctx.remaining_s())
            if self._fleet.card() != ctx.model:
                # What came up is not what was there before.
                await self._prepare(ctx, tenant)
            num_prompt_tokens = len(ctx.tokens().prompt_token_ids)
            self._metrics.prompt_tokens.inc(num_prompt_tokens)
            self._metrics.request_prompt_tokens.observe(num_prompt_tokens)
            await self._route(ctx)
            await self._prefill(ctx)
            responder = Responder(ctx, self._tokenizer, self._metrics)
            async with aclosing(self._decode(ctx)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield responder.push(chunk)
                    if chunk.finish_reason is None and ctx.outputs[chunk.index].finish_reason:
                        # Met a stop string, which the worker knows nothing of.
                        if ctx.is_finished:
                            break
                        await self._decode.stop(ctx, chunk.index)
            self._metrics.cached_prompt_tokens.inc(ctx.cached_tokens)

    async def _prepare(self, ctx: RequestContext, tenant: Tenant) -> None:
        """Check and tokenise for what is served, and look for stored KV."""
        ctx.model = await self.model(ctx.request.model, tenant, ctx.remaining_s())
        check_against_model(ctx.request, ctx.model)
        check_speculation(ctx.request.speculation.mode, self._fleet.drafters(ctx.model.kv_root))
        await self._tokenise(ctx)
        await self._lookup(ctx)

    async def model(self, name: str, tenant: Tenant, timeout_s: float) -> ModelCard:
        """Return what is served under a name, once a worker has said so.

        Raises:
            PermissionDeniedError: the tenant may not name it.
            NotFoundError: it is not served here.
            UnavailableError: no worker appeared in time.
            ExhaustedError: too many requests wait for one.
            DeadlineError: `timeout_s` passed before.
        """
        served = self._settings.model_name
        tenant.check_model(name or served)
        if name not in ("", served):
            raise NotFoundError("no such model is served here")
        if self._fleet.card() is None:
            await self.parking.wait(lambda: self._fleet.card() is not None, timeout_s)
        card = self._fleet.card()
        assert card is not None, "what was served is not forgotten"
        return card


@contextmanager
def _logged(ctx: RequestContext) -> Iterator[None]:
    """Write a request's one log line when it ends, however it ends."""
    outcome = "cancelled"
    try:
        yield
        outcome = "ok"
    except Exception as error:
        outcome = getattr(error, "reason", "internal")
        raise
    finally:
        _log_end(ctx, "ok" if ctx.is_finished else outcome)


def _log_end(ctx: RequestContext, outcome: str) -> None:
    fields = {
        "outcome": outcome,
        "tenant": ctx.tenant,
        "prompt_tokens": len(ctx.spec.prompt_token_ids) if ctx.spec else None,
        "cached_prompt_tokens": ctx.cached_tokens,
        "completion_tokens": ctx.num_output_tokens,
        "target_steps": sum(o.target_steps for o in ctx.outputs),
        "drafted_tokens": sum(o.drafted_tokens for o in ctx.outputs),
        "accepted_tokens": sum(o.accepted_tokens for o in ctx.outputs),
        "finish_reasons": [o.finish_reason.value for o in ctx.outputs if o.finish_reason],
        "prefill_worker": ctx.computed_by,
        "decode_worker": ctx.decode_worker.id if ctx.decode_worker else "",
        "migrations": ctx.migrations,
        "ttft_s": min((o.first_token_s for o in ctx.outputs if o.first_token_s), default=None),
        "e2e_s": time.monotonic() - ctx.arrival_s,
    }
    logger.info("request-finished", extra={"fields": fields})
    note_request(ctx, fields)
