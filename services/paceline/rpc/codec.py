"""Between wire messages and domain values, both ways. No checks: the gateway validates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from paceline.domain.cost import NO_CURVE, Curve, StepCost, StepCurves
from paceline.domain.request import (
    FinishReason,
    GenerationSpec,
    SamplingParams,
    TokenChunk,
    TokenLogprobs,
)
from paceline.v1 import engine_pb2, inference_pb2, worker_pb2

_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
}
_REASONS_BACK = {number: reason for reason, number in _REASONS.items()}


def sampling_to_proto(params: SamplingParams) -> inference_pb2.SamplingParams:
    """Encode sampling parameters; every field is set."""
    return inference_pb2.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
    )


def sampling_from_proto(message: inference_pb2.SamplingParams) -> SamplingParams:
    """Decode sampling parameters; unset fields get their defaults, an unset seed is 0."""
    has = message.HasField
    return SamplingParams(
        temperature=message.temperature if has("temperature") else 1.0,
        top_k=message.top_k,
        top_p=message.top_p if has("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if has("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed,
    )


def spec_to_proto(spec: GenerationSpec) -> worker_pb2.GenerationSpec:
    """Encode a request in tokens."""
    return worker_pb2.GenerationSpec(
        request_id=spec.request_id,
        cache_salt=spec.cache_salt,
        prompt_token_ids=spec.prompt_token_ids,
        sampling=sampling_to_proto(spec.sampling),
        max_tokens=spec.max_tokens,
        stop_token_ids=sorted(spec.stop_token_ids),
        ignore_eos=spec.ignore_eos,
        logprobs=spec.logprobs,
        n=spec.n,
        priority=spec.priority,
        speculation=spec.speculation,
        is_seed_drawn=spec.is_seed_drawn,
        domain=spec.domain,
        allow_training=spec.allow_training,
    )


def spec_from_proto(message: worker_pb2.GenerationSpec) -> GenerationSpec:
    """Decode a request in tokens."""
    return GenerationSpec(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_from_proto(message.sampling),
        max_tokens=message.max_tokens,
        cache_salt=message.cache_salt,
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs,
        n=message.n,
        priority=message.priority,
        speculation=message.speculation or "AUTO",
        is_seed_drawn=message.is_seed_drawn,
        domain=message.domain,
        allow_training=message.allow_training,
    )


def logprobs_to_proto(logprobs: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    """Encode one position's log-probabilities."""
    return inference_pb2.TokenLogprobs(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        top=[inference_pb2.TopLogprob(token_id=t, logprob=p) for t, p in logprobs.top],
    )


def logprobs_from_proto(message: inference_pb2.TokenLogprobs) -> TokenLogprobs:
    """Decode one position's log-probabilities."""
    top = tuple((entry.token_id, entry.logprob) for entry in message.top)
    return TokenLogprobs(message.token_id, message.logprob, top)


def finish_reason_to_proto(reason: FinishReason | None) -> inference_pb2.FinishReason:
    """Encode why an output ended; None is "not ended"."""
    return inference_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _REASONS[reason]


def chunk_to_proto(chunk: TokenChunk) -> worker_pb2.TokenChunk:
    """Encode new tokens of an output."""
    return worker_pb2.TokenChunk(
        index=chunk.index,
        token_ids=chunk.token_ids,
        logprobs=[logprobs_to_proto(entry) for entry in chunk.logprobs],
        finish_reason=finish_reason_to_proto(chunk.finish_reason),
        target_steps=chunk.target_steps,
        drafted_tokens=chunk.drafted_tokens,
        accepted_tokens=chunk.accepted_tokens,
        draft_version=chunk.draft_version,
    )


def chunk_from_proto(message: worker_pb2.TokenChunk) -> TokenChunk:
    """Decode new tokens of an output."""
    return TokenChunk(
        index=message.index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(logprobs_from_proto(entry) for entry in message.logprobs),
        finish_reason=_REASONS_BACK.get(message.finish_reason),
        target_steps=message.target_steps,
        drafted_tokens=message.drafted_tokens,
        accepted_tokens=message.accepted_tokens,
        draft_version=message.draft_version,
    )


def resumed_to_proto(resumed: Mapping[int, tuple[int, ...]]) -> list[worker_pb2.ResumedOutput]:
    """Encode outputs that go on elsewhere."""
    return [worker_pb2.ResumedOutput(index=index, token_ids=ids) for index, ids in resumed.items()]


def resumed_from_proto(
    messages: Iterable[worker_pb2.ResumedOutput],
) -> dict[int, tuple[int, ...]]:
    """Decode outputs that go on here."""
    return {message.index: tuple(message.token_ids) for message in messages}


def step_cost_to_proto(cost: StepCost) -> engine_pb2.StepCost:
    """Encode a step cost."""
    message = engine_pb2.StepCost(
        base_s=cost.base_s,
        row_s=cost.row_s,
        token_s=cost.token_s,
        context_s=cost.context_s,
        floor_s=cost.floor_s,
    )
    if cost.curves is not None:
        message.curves.CopyFrom(_curves_to_proto(cost.curves))
    return message


def step_cost_from_proto(message: engine_pb2.StepCost) -> StepCost:
    """Decode a step cost."""
    curves = _curves_from_proto(message.curves) if message.HasField("curves") else None
    return StepCost(
        message.base_s,
        message.row_s,
        message.token_s,
        message.context_s,
        curves,
        message.floor_s,
    )


def _curves_to_proto(curves: StepCurves) -> engine_pb2.StepCurves:
    return engine_pb2.StepCurves(
        tokens=_curve_to_proto(curves.tokens),
        rows=_curve_to_proto(curves.rows),
        contexts=_curve_to_proto(curves.contexts),
        prefill_row_s=curves.prefill_row_s,
        prefill_read_s=curves.prefill_read_s,
        prefill_context_s=curves.prefill_context_s,
        nodes=_curve_to_proto(curves.nodes),
        node_context_s=curves.node_context_s,
    )


def _curves_from_proto(message: engine_pb2.StepCurves) -> StepCurves:
    return StepCurves(
        tokens=_curve_from_proto(message.tokens),
        rows=_curve_from_proto(message.rows),
        contexts=_curve_from_proto(message.contexts),
        prefill_row_s=message.prefill_row_s,
        prefill_read_s=message.prefill_read_s,
        prefill_context_s=message.prefill_context_s,
        nodes=_curve_from_proto(message.nodes) if message.HasField("nodes") else NO_CURVE,
        node_context_s=message.node_context_s,
    )


def _curve_to_proto(curve: Curve) -> engine_pb2.Curve:
    return engine_pb2.Curve(counts=curve.counts, seconds=curve.seconds)


def _curve_from_proto(message: engine_pb2.Curve) -> Curve:
    return Curve(tuple(message.counts), tuple(message.seconds))
