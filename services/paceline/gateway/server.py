"""InferenceService: the public door. Makes contexts, leaves the work to pipeline.py."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from paceline.domain.errors import InvalidRequestError
from paceline.gateway.admission import Admission
from paceline.gateway.auth import Authenticator
from paceline.gateway.context import RequestContext
from paceline.gateway.fleet import FleetView
from paceline.gateway.pipeline import Pipeline
from paceline.gateway.settings import GatewaySettings
from paceline.gateway.steps.tokenise import TokeniseStep
from paceline.gateway.steps.validate import check_messages, check_request_id
from paceline.process.logs import request_id_var
from paceline.v1 import inference_pb2

SERVICE_NAME = "paceline.v1.InferenceService"

_MAX_TIMEOUT_S = 86_400.0


class InferenceServicer:
    """gRPC face of the gateway."""

    def __init__(
        self,
        pipeline: Pipeline,
        tokenise: TokeniseStep,
        fleet: FleetView,
        authenticator: Authenticator,
        settings: GatewaySettings,
    ) -> None:
        self._pipeline = pipeline
        self._tokenise = tokenise
        self._fleet = fleet
        self._authenticator = authenticator
        self._settings = settings
        self._counting = Admission(settings.max_in_flight)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Stream the outputs of one request."""
        arrival_s = time.monotonic()
        tenant = self._authenticator.tenant(context.invocation_metadata() or ())
        check_request_id(request.request_id)
        request_id = request.request_id or request_id_var.get() or secrets.token_hex(8)
        request_id_var.set(request_id)
        ctx = RequestContext(request, request_id, arrival_s, arrival_s + self._timeout_s(context))
        responses = self._pipeline.generate(ctx, tenant)
        try:
            async for response in responses:
                yield response
        finally:
            await responses.aclose()  # type: ignore[attr-defined]

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """List the served model, if the caller may name it."""
        tenant = self._authenticator.tenant(context.invocation_metadata() or ())
        name = self._settings.model_name
        if tenant.models is not None and name not in tenant.models:
            return inference_pb2.ListModelsResponse()
        model = inference_pb2.Model(name=name)
        card = self._fleet.card()
        if card is not None:
            model.max_context_tokens = card.max_context_tokens
            model.vocab_size = card.vocab_size
            model.digest = card.digest
            model.is_ready = self._fleet.is_served
        return inference_pb2.ListModelsResponse(models=[model])

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: Any
    ) -> inference_pb2.CountTokensResponse:
        """Tokenise without generating."""
        tenant = self._authenticator.tenant(context.invocation_metadata() or ())
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequestError("input", "one of prompt or messages is needed")
        if kind == "messages":
            check_messages(request.messages)
        timeout_s = self._timeout_s(context)
        with self._counting.admit(tenant.name, secrets.token_hex(8)):
            card = await self._pipeline.model(request.model, tenant, timeout_s)
            ids = await self._tokenise.encode(request, card, timeout_s)
        return inference_pb2.CountTokensResponse(num_tokens=len(ids), token_ids=ids)

    def _timeout_s(self, context: Any) -> float:
        remaining = context.time_remaining()
        if remaining is None:
            return self._settings.default_deadline_s
        return max(0.0, min(float(remaining), _MAX_TIMEOUT_S))
