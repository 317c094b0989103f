"""Turns token chunks into what the client gets: text, log-probabilities, usage at the end.

Books every token in the context, so that a resumed stream knows what the client has.
"""

from __future__ import annotations

import time

from paceline.domain.request import FinishReason, TokenChunk
from paceline.gateway.context import Output, RequestContext
from paceline.gateway.detokenizer import Detokenizer
from paceline.gateway.stop_strings import StopStrings
from paceline.gateway.tokenizer import ModelTokenizer
from paceline.process.metrics import Metrics
from paceline.process.spans import current_span
from paceline.rpc import codec
from paceline.v1 import inference_pb2


class Responder:
    """Writes the responses of one request."""

    def __init__(self, ctx: RequestContext, tokenizer: ModelTokenizer, metrics: Metrics) -> None:
        self._ctx = ctx
        self._metrics = metrics
        stop = StopStrings(ctx.request.stop)
        self._texts = [Detokenizer(tokenizer.vocabulary, stop) for _ in ctx.outputs]
        self._last_piece_s = [ctx.arrival_s for _ in ctx.outputs]

    def push(self, chunk: TokenChunk) -> inference_pb2.GenerateResponse:
        """Book a chunk and return its response; the output may end by a stop string here."""
        output, text = self._ctx.outputs[chunk.index], self._texts[chunk.index]
        piece, used = text.push(list(chunk.token_ids))
        self._note_times(output, used)
        _book(output, chunk, used)
        response = inference_pb2.GenerateResponse(
            index=chunk.index,
            text=piece,
            token_ids=chunk.token_ids[:used],
            logprobs=[codec.logprobs_to_proto(entry) for entry in chunk.logprobs[:used]],
        )
        reason = FinishReason.STOP if text.is_stopped else chunk.finish_reason
        if reason is not None:
            response.text += text.finish()
            # What was held back may complete a stop string after all.
            output.finish_reason = FinishReason.STOP if text.is_stopped else reason
            response.finish_reason = codec.finish_reason_to_proto(output.finish_reason)
            response.usage.CopyFrom(self._usage(output))
        return response

    def _note_times(self, output: Output, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        now = time.monotonic()
        if output.first_token_s is None:
            output.first_token_s = now - self._ctx.arrival_s
            current_span().event("first-token", {"paceline.index": output.index}, at_s=now)
            self._metrics.ttft_seconds.observe(output.first_token_s)
        else:
            self._metrics.itl_seconds.observe(now - self._last_piece_s[output.index])
        self._last_piece_s[output.index] = now
        self._metrics.completion_tokens.inc(num_tokens)

    def _usage(self, output: Output) -> inference_pb2.Usage:
        ctx = self._ctx
        e2e_s = time.monotonic() - ctx.arrival_s
        self._metrics.e2e_seconds.observe(e2e_s)
        return inference_pb2.Usage(
            prompt_tokens=len(ctx.tokens().prompt_token_ids),
            cached_prompt_tokens=ctx.cached_tokens,
            completion_tokens=len(output.token_ids),
            target_steps=output.target_steps,
            drafted_tokens=output.drafted_tokens,
            accepted_tokens=output.accepted_tokens,
            draft_version=output.draft_version,
            ttft_s=output.first_token_s or e2e_s,
            e2e_s=e2e_s,
            prefill_worker=ctx.computed_by,
            decode_worker=ctx.decode_worker.id if ctx.decode_worker is not None else "",
            migrations=ctx.migrations,
        )


def _book(output: Output, chunk: TokenChunk, used: int) -> None:
    """Add the first `used` tokens of a chunk to an output, and what they took.

    What was drafted was drafted, used or not.
    """
    total = len(chunk.token_ids)
    output.token_ids.extend(chunk.token_ids[:used])
    output.target_steps += _share(chunk.target_steps, used, total)
    output.accepted_tokens += _share(chunk.accepted_tokens, used, total)
    output.drafted_tokens += chunk.drafted_tokens
    output.draft_version = chunk.draft_version or output.draft_version


def _share(count: int, used: int, total: int) -> int:
    """Return how many of `count` belong to the first `used` of `total` tokens, rounded up.

    Exact for the tokens of one pass: it draws the last of them, those in front were accepted.
    """
    return count if used == total else -(-count * used // total)
