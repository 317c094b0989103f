"""Chooses the workers of a request: gathers candidates, lets the policy decide, logs why."""

from __future__ import annotations

import logging

from paceline.domain.drafts import is_label, member_name
from paceline.domain.member import Member, Role
from paceline.gateway.context import RequestContext
from paceline.gateway.fleet import FleetView
from paceline.gateway.parking import Parking
from paceline.gateway.routing.base import Decision, FleetLoad, RoutingPolicy, RoutingRequest
from paceline.gateway.settings import GatewaySettings
from paceline.process.metrics import Metrics
from paceline.process.spans import span

logger = logging.getLogger(__name__)

MAX_SOURCES = 4
"""Nodes asked one after the other for what is missing, within one pull's time."""


class RouteStep:
    """Fills the workers of a request."""

    def __init__(
        self,
        fleet: FleetView,
        policy: RoutingPolicy,
        parking: Parking,
        settings: GatewaySettings,
        metrics: Metrics,
    ) -> None:
        self._fleet = fleet
        self._parking = parking
        self._policy = policy
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, ctx: RequestContext, *, is_resumed: bool = False) -> None:
        """Fill `prefill_worker` and `decode_worker`; a resumed stream goes straight to decode.

        Raises:
            UnavailableError: no worker appeared in time.
            ExhaustedError: too many requests wait for one.
            DeadlineError: the deadline passed while waiting for one.
        """
        with span("route") as routing:
            decision = await self._decide(ctx, is_resumed)
            kind = "resumed" if is_resumed else "split" if decision.prefill else "decode-only"
            routing.set(
                {
                    "paceline.kind": kind,
                    "paceline.prefill_worker": decision.prefill.id if decision.prefill else "",
                    "paceline.decode_worker": decision.decode.id,
                    "paceline.predicted_ttft_s": decision.predicted_ttft_s,
                }
            )
        ctx.prefill_worker, ctx.decode_worker = decision.prefill, decision.decode
        ctx.predicted_ttft_s = decision.predicted_ttft_s
        self._metrics.routing_decisions.labels(kind).inc()
        if logger.isEnabledFor(logging.DEBUG):
            fields = {
                "prefill": decision.prefill.id if decision.prefill else "",
                "decode": decision.decode.id,
                "predicted_ttft_s": decision.predicted_ttft_s,
                "terms_s": dict(decision.terms),
                "saved_s": decision.saved_s,
                "holders": ctx.holders,
            }
            logger.debug("routed", extra={"fields": fields})

    async def _decide(self, ctx: RequestContext, is_resumed: bool) -> Decision:
        """Ask the policy, once there are workers."""
        fleet, model = self._fleet, ctx.card()
        decode = await self._decode_workers(ctx)
        return self._policy.decide(
            RoutingRequest(
                num_tokens=len(ctx.tokens().prompt_token_ids) + ctx.longest_output,
                block_size=model.block_size,
                block_bytes=model.block_bytes,
                holders=ctx.holders,
                max_tokens=_max_tokens(ctx),
                fitting_drafters=fitting_drafters(ctx),
            ),
            FleetLoad(
                prefill=[] if is_resumed else fleet.workers(Role.PREFILL, model.kv_root),
                decode=decode,
                in_flight=fleet.in_flight,
                pending_tokens=fleet.pending_tokens,
                near_bytes_per_s=self._settings.shm_bytes_per_s,
                far_bytes_per_s=self._settings.grpc_bytes_per_s,
                hop_s=self._settings.hop_s,
            ),
        )

    async def _decode_workers(self, ctx: RequestContext) -> list[Member]:
        """Return candidates, once there are some; suspects only where nobody else is left.

        A drafter named by the client narrows the choice while somebody has it.
        """
        fleet, root, mode = self._fleet, ctx.card().kv_root, ctx.tokens().speculation
        found: list[Member] = []

        def is_there() -> bool:
            workers = fleet.workers(Role.DECODE, root) or fleet.last_resorts(Role.DECODE, root)
            found[:] = [w for w in workers if mode in w.drafters] or workers
            return bool(found)

        if not is_there():
            await self._parking.wait(is_there, ctx.remaining_s())
        return found


def fitting_drafters(ctx: RequestContext) -> frozenset[str]:
    """Return the names of drafters for the request's domain or tenant; none where it chose."""
    spec = ctx.tokens()
    if spec.speculation != "AUTO":
        return frozenset()
    labels = (spec.domain, ctx.tenant)
    return frozenset(member_name(label) for label in labels if is_label(label))


def _max_tokens(ctx: RequestContext) -> int:
    """Return how many tokens all outputs together may still bring."""
    left = (
        ctx.tokens().max_tokens - len(output.token_ids)
        for output in ctx.outputs
        if output.finish_reason is None
    )
    return sum(left)


def kv_sources(fleet: FleetView, ctx: RequestContext, first: Member | None) -> list[str]:
    """Return the transport URIs of nodes that may hold KV of the request, best first."""
    ids = [first.node_id] if first is not None else []
    ids += sorted(ctx.holders, key=lambda id_: (-ctx.holders[id_], id_))
    nodes = [fleet.node(id_) for id_ in dict.fromkeys(ids)]
    return [node.kv_uri for node in nodes if node is not None and node.kv_uri][:MAX_SOURCES]
