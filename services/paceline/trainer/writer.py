"""Lets the target write the text that a draft learns from, and keeps what it thought of it.

A draft serves on what the target says, so that is what it learns from (FastDraft, Zafrir et al.
2024): answers at several temperatures, to given prompts or to turns that the target
made up itself. The likeliest tokens at each position come with generation; no second pass.
create.py calls this between rounds of training; sequences in flight wait meanwhile.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from paceline.domain.errors import InternalError, InvalidRequestError
from paceline.domain.learnings import Sample
from paceline.domain.request import GenerationSpec, SamplingParams, TokenChunk
from paceline.engine.engine import Engine
from paceline.engine.events import FailedEvent, LearningsEvent, OutputEvent
from paceline.trainer.options import Tokens
from paceline.trainer.texts import Text

TEMPERATURES = (0.0, 0.6, 0.8, 1.0)
"""Of answers, in turn, unless asked otherwise. Turns of the user are always drawn at 1, to be as
various as can be."""

_TURN_SHARE = 3
"""A user's turn gets one in so many of the context's tokens."""
_LEAST_ANSWER_TOKENS = 16
_MOST_DROPPED = 1000
"""Useless turns in a row after which a target counts as unable to write any."""


@dataclass(frozen=True, slots=True)
class WriterPlan:
    """What is written."""

    opening: Tokens
    bridge: Tokens
    prompts: Sequence[Tokens]
    context_tokens: int
    concurrency: int
    top: int
    """Likeliest tokens kept at each position."""
    turn_weight: float
    """How much positions of a user's turn count against those of an answer."""
    eos_token_ids: tuple[int, ...]
    seed: int
    num_texts: int | None = None
    """How many to begin; None never stops."""
    temperatures: tuple[float, ...] = TEMPERATURES
    """Of answers, in turn."""
    is_captured: bool = False
    """Whether the engine may capture samples of what is written."""


@dataclass(slots=True)
class _Draft:
    """A text in the making."""

    tokens: list[int]
    num_given: int
    temperature: float
    is_turn: bool = False
    """Whether the user's turn is being written."""
    top_ids: dict[int, npt.NDArray[np.int32]] = field(default_factory=dict)
    """Likeliest tokens by position."""
    top_logprobs: dict[int, npt.NDArray[np.float16]] = field(default_factory=dict)
    answer_begin: int = 0


class TargetWriter:
    """Keeps an engine full and hands out texts as they are finished."""

    def __init__(self, engine: Engine, plan: WriterPlan) -> None:
        self._engine = engine
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._temperatures = itertools.cycle(plan.temperatures)
        self._prompts = itertools.cycle(plan.prompts)
        self._names = itertools.count()
        self._drafts: dict[str, _Draft] = {}
        self._captured: list[Sample] = []
        self._num_dropped = 0
        self._num_left = math.inf if plan.num_texts is None else plan.num_texts

    def take(
        self, deadline_s: float, monotonic: Callable[[], float] = time.monotonic
    ) -> list[Text]:
        """Return the texts that are finished by the deadline, or all there will be; at least one.

        Raises:
            InternalError: the engine could not compute a text.
            InvalidRequestError: the target writes nothing where a user's turn should be.
        """
        texts: list[Text] = []
        while not texts or monotonic() < deadline_s:
            while len(self._drafts) < self._plan.concurrency and self._num_left > 0:
                self._num_left -= 1
                self._begin()
            if not self._drafts:
                break
            for event in self._engine.step():
                text = self._note(event)
                if text is not None:
                    texts.append(text)
        return texts

    def captured(self) -> list[Sample]:
        """Return the samples that the engine captured of texts that are finished, in order.

        Each once; call it while nothing is being written.
        """
        while self._engine.has_work:
            for event in self._engine.step():
                self._note(event)
        found, self._captured = self._captured, []
        return found

    def close(self) -> None:
        """Give up what is being written, so that the engine is free for another writer."""
        for name in self._drafts:
            self._engine.cancel(name)
        self._drafts.clear()
        self._engine.step()

    def _begin(self) -> None:
        plan = self._plan
        if plan.prompts:
            prompt = list(next(self._prompts))
            self._answer(_Draft(prompt, len(prompt), next(self._temperatures)))
        elif plan.bridge:
            draft = _Draft(list(plan.opening), len(plan.opening), 1.0, is_turn=True)
            stops = frozenset({plan.bridge[0], *plan.eos_token_ids})
            self._submit(draft, plan.context_tokens // _TURN_SHARE, stops)
        else:
            draft = _Draft(list(plan.opening), len(plan.opening), next(self._temperatures))
            self._answer(draft)

    def _answer(self, draft: _Draft) -> None:
        draft.answer_begin = len(draft.tokens)
        self._submit(draft, self._plan.context_tokens - len(draft.tokens), frozenset())

    def _submit(self, draft: _Draft, max_tokens: int, stops: frozenset[int]) -> None:
        name = f"{self._plan.seed}-{next(self._names)}"
        self._drafts[name] = draft
        self._engine.submit(
            GenerationSpec(
                request_id=name,
                prompt_token_ids=tuple(draft.tokens),
                sampling=SamplingParams(draft.temperature, seed=self._random.getrandbits(63)),
                max_tokens=max(1, max_tokens),
                stop_token_ids=stops,
                logprobs=self._plan.top,
                allow_training=self._plan.is_captured,
            )
        )

    def _note(self, event: object) -> Text | None:
        if isinstance(event, FailedEvent):
            raise InternalError(f"the target failed: {event.message}", reason=event.reason)
        if isinstance(event, LearningsEvent):
            self._captured += event.samples
        if not isinstance(event, OutputEvent):
            return None
        draft = self._drafts[event.request_id]
        for chunk in event.chunks:
            _extend(draft, chunk)
        if not event.is_finished:
            return None
        del self._drafts[event.request_id]
        if not draft.is_turn:
            return self._text(draft)
        self._close_turn(draft)
        return None

    def _close_turn(self, draft: _Draft) -> None:
        """Cut the turn where it ends and let the answer begin."""
        plan = self._plan
        if draft.tokens[-1] in {plan.bridge[0], *plan.eos_token_ids}:
            draft.tokens.pop()
        room = plan.context_tokens - _LEAST_ANSWER_TOKENS - len(plan.bridge)
        if not draft.num_given < len(draft.tokens) <= room:
            # Nothing was asked, or there is no room for an answer.
            self._num_dropped += 1
            if self._num_dropped > _MOST_DROPPED:
                raise InvalidRequestError("prompts", "the target writes no turns; name prompts")
            self._num_left += 1
            return
        self._num_dropped = 0
        draft.tokens += plan.bridge
        draft.is_turn = False
        draft.temperature = next(self._temperatures)
        self._answer(draft)

    def _text(self, draft: _Draft) -> Text:
        length, top = len(draft.tokens), self._plan.top
        ids_TK = np.zeros((length, top), np.int32)
        logprobs_TK = np.full((length, top), -np.inf, np.float16)
        weights_T = np.zeros(length, np.float32)
        for position, ids_K in draft.top_ids.items():
            ids_TK[position, : len(ids_K)] = ids_K
            logprobs_TK[position, : len(ids_K)] = draft.top_logprobs[position]
            is_answer = position >= draft.answer_begin - 1
            weights_T[position] = 1.0 if is_answer else self._plan.turn_weight
        tokens_T = np.array(draft.tokens, np.int32)
        return Text(tokens_T, ids_TK, logprobs_TK, weights_T, draft.temperature)


def _extend(draft: _Draft, chunk: TokenChunk) -> None:
    for token, logprobs in zip(chunk.token_ids, chunk.logprobs, strict=True):
        # Arrays at once: the pairs take some ten times their memory.
        ids, values = zip(*logprobs.top, strict=True)
        draft.top_ids[len(draft.tokens) - 1] = np.array(ids, np.int32)
        draft.top_logprobs[len(draft.tokens) - 1] = np.array(values, np.float16)
        draft.tokens.append(token)
