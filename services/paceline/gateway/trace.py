"""What the span of a request says of it, under the names that OpenTelemetry has for them.

pipeline.py calls this when a request ends. Names of the project's own begin with "paceline.";
neither prompts nor answers are ever part of a span.
"""

from __future__ import annotations

from collections.abc import Mapping

from paceline.gateway.context import RequestContext
from paceline.process.logs import note_fields
from paceline.process.spans import Attributes, current_span

_NAMED_ELSEWHERE = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "finish_reasons")


def note_request(ctx: RequestContext, fields: Mapping[str, object]) -> None:
    """Describe a request that ended on its span; `fields` are those of its log line."""
    span = current_span()
    if not span.is_recording:
        return
    span.set(_request_attributes(ctx))
    span.set(_usage_attributes(ctx))
    own = {name: value for name, value in fields.items() if name not in _NAMED_ELSEWHERE}
    note_fields({**own, "request_id": ctx.request_id, "predicted_ttft_s": ctx.predicted_ttft_s})


def _request_attributes(ctx: RequestContext) -> Attributes:
    """Return what was asked for; what the client left open is not there."""
    request, sampling = ctx.request, ctx.request.sampling
    has_messages = request.WhichOneof("input") == "messages"
    attributes: dict[str, str | bool | int | float] = {
        "gen_ai.operation.name": "chat" if has_messages else "text_completion",
        "gen_ai.provider.name": "paceline",
        "gen_ai.request.stream": True,
    }
    name = request.model or (ctx.model.name if ctx.model is not None else "")
    if name:
        attributes["gen_ai.request.model"] = name
    if ctx.spec is not None:
        attributes["gen_ai.request.choice.count"] = ctx.spec.n
        attributes["gen_ai.request.max_tokens"] = ctx.spec.max_tokens
    for field in ("temperature", "top_p"):
        if sampling.HasField(field):
            attributes[f"gen_ai.request.{field}"] = getattr(sampling, field)
    return attributes


def _usage_attributes(ctx: RequestContext) -> Attributes:
    if ctx.spec is None:
        return {}
    reasons = [o.finish_reason.value for o in ctx.outputs if o.finish_reason is not None]
    return {
        "gen_ai.usage.input_tokens": len(ctx.spec.prompt_token_ids),
        "gen_ai.usage.cache_read.input_tokens": ctx.cached_tokens,
        "gen_ai.usage.output_tokens": ctx.num_output_tokens,
        "gen_ai.response.finish_reasons": reasons,
    }
