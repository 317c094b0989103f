"""Turns the validated request into tokens: the spec that workers and the engine see.

Text that cannot fit is refused before it is tokenised; longer texts are tokenised on a
thread, so that they do not delay other streams.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from paceline.domain.errors import DeadlineError, InvalidRequestError
from paceline.domain.member import ModelCard
from paceline.domain.request import GenerationSpec
from paceline.gateway.context import Output, RequestContext
from paceline.gateway.steps.validate import check_length
from paceline.gateway.tokenizer import ModelTokenizer
from paceline.process.spans import span
from paceline.rpc import codec
from paceline.v1 import inference_pb2

_INLINE_CHARS = 4096
"""Takes about a millisecond; a thread's detour costs a tenth of that."""

_MESSAGE_CHARS = 64
"""Characters that take as long as what a chat template does for one message."""

_HEAD_CHARS_PER_TOKEN = 8
"""More than text has on average in any language; a token takes about 250 bytes here."""

_SEAM_TOKENS = 64
"""How many tokens a text may have less than its beginning alone: those at the cut."""


class TokeniseStep:
    """Tokenises prompts and conversations of one model."""

    def __init__(
        self, tokenizer: ModelTokenizer, default_max_tokens: int, draw_seed: Callable[[], int]
    ) -> None:
        self._tokenizer = tokenizer
        self._default_max_tokens = default_max_tokens
        self._draw_seed = draw_seed

    async def __call__(self, ctx: RequestContext) -> None:
        """Fill `spec` and `outputs`.

        Raises:
            InvalidRequestError: the text is empty or does not fit; ready tokens were checked.
            DeadlineError: it took too long.
        """
        request, model = ctx.request, ctx.card()
        with span("tokenise") as tokenising:
            if request.WhichOneof("input") == "token_ids":
                ids = list(request.token_ids.ids)
            else:
                ids = await self.encode(request, model, ctx.remaining_s())
            tokenising.set({"gen_ai.usage.input_tokens": len(ids)})
        room = model.max_context_tokens - len(ids)
        max_tokens = request.max_tokens if request.HasField("max_tokens") else None
        sampling = request.sampling
        is_seed_drawn = not sampling.HasField("seed")
        if is_seed_drawn:
            sampling.seed = self._draw_seed()
        ctx.spec = GenerationSpec(
            # Drawn here: two clients may use one id, and blocks of a tail are keyed by it.
            request_id=f"{ctx.request_id[:64]}.{secrets.token_hex(8)}",
            prompt_token_ids=tuple(ids),
            sampling=codec.sampling_from_proto(sampling),
            max_tokens=min(max_tokens or self._default_max_tokens, room),
            cache_salt=ctx.tenant.encode(),
            stop_token_ids=frozenset(request.stop_token_ids) | self._special_stops(request),
            ignore_eos=request.ignore_eos,
            logprobs=request.logprobs,
            n=request.n if request.HasField("n") else 1,
            priority=request.priority,
            speculation=request.speculation.mode or "AUTO",
            # The request may have come by before, for a model that is gone.
            is_seed_drawn=is_seed_drawn or (ctx.spec is not None and ctx.spec.is_seed_drawn),
            domain=request.domain,
            allow_training=ctx.may_train
            and (request.allow_training or not request.HasField("allow_training")),
        )
        ctx.outputs = [Output(index) for index in range(ctx.spec.n)]

    async def encode(
        self,
        request: inference_pb2.GenerateRequest | inference_pb2.CountTokensRequest,
        model: ModelCard,
        timeout_s: float,
    ) -> list[int]:
        """Tokenise the text of a request.

        Raises:
            InvalidRequestError: it does not fit, or the chat template refuses it.
            DeadlineError: it took too long.
        """
        is_chat = request.WhichOneof("input") == "messages"
        field = "messages" if is_chat else "prompt"
        messages = [{"role": m.role, "content": m.content} for m in request.messages.messages]
        texts = [m["content"] for m in messages] if is_chat else [request.prompt]
        if is_chat:
            self._check_bytes(field, texts, model)

        def encode() -> list[int]:
            text = self._tokenizer.render(messages) if is_chat else request.prompt
            self._check_bytes(field, [text], model)
            self._check_head(field, text, model)
            return self._tokenizer.encode(text, add_special_tokens=not is_chat)

        if sum(map(len, texts)) + _MESSAGE_CHARS * len(messages) <= _INLINE_CHARS:
            ids = encode()
        else:
            try:
                async with asyncio.timeout(timeout_s):
                    ids = await asyncio.to_thread(encode)
            except TimeoutError as error:
                raise DeadlineError("the deadline passed while tokenising") from error
        check_length(field, len(ids), model)
        return ids

    def _special_stops(self, request: inference_pb2.GenerateRequest) -> frozenset[int]:
        """Return special tokens named as stop strings: text never contains them."""
        ids = map(self._tokenizer.vocabulary.special_id, request.stop)
        return frozenset(id_ for id_ in ids if id_ is not None)

    def _check_bytes(self, field: str, texts: list[str], model: ModelCard) -> None:
        """Refuse text that would not fit even in the longest tokens."""
        num_bytes = sum(len(text.encode()) for text in texts)
        _check_least(field, num_bytes // self._tokenizer.longest_token_bytes, model)

    def _check_head(self, field: str, text: str, model: ModelCard) -> None:
        """Refuse text whose beginning is too long already; all of it would take much memory."""
        num_chars = model.max_context_tokens * _HEAD_CHARS_PER_TOKEN
        if len(text) > num_chars:
            ids = self._tokenizer.encode(text[:num_chars], add_special_tokens=False)
            _check_least(field, len(ids) - _SEAM_TOKENS, model)


def _check_least(field: str, num_tokens: int, model: ModelCard) -> None:
    limit = model.max_context_tokens - 1
    if num_tokens > limit:
        raise InvalidRequestError(
            field,
            f"at least {num_tokens} tokens, at most {limit} fit the context",
            reason="context-too-long",
        )
