"""What the target writes, and what it thought: against transformers' own numbers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from paceline.domain.errors import InvalidRequestError
from paceline.engine.build import build_engine
from paceline.engine.engine import Engine
from paceline.engine.options import EngineOptions
from paceline.trainer.texts import Text
from paceline.trainer.writer import TEMPERATURES, TargetWriter, WriterPlan

OPENING, BRIDGE = (20, 21), (30, 31)
CONTEXT = 48


@pytest.fixture(scope="module")
def engine(target: Path) -> Engine:
    # As for `draft create`: drafts come when they come, and which text begins next with them.
    options = EngineOptions(model=str(target), num_kv_blocks=64, max_num_seqs=8, drafters=())
    return build_engine(options)[0]


def writer(engine: Engine, **changes: object) -> TargetWriter:
    values: dict[str, object] = dict(
        opening=OPENING,
        bridge=BRIDGE,
        prompts=(),
        context_tokens=CONTEXT,
        concurrency=8,
        top=6,
        turn_weight=0.25,
        eos_token_ids=(261,),
        seed=5,
        num_texts=12,
    )
    return TargetWriter(engine, WriterPlan(**{**values, **changes}))  # type: ignore[arg-type]


def take_all(made: TargetWriter) -> list[Text]:
    return made.take(deadline_s=float("inf"))


def test_named_tokens_are_the_targets_likeliest(engine: Engine, target: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    for text in take_all(writer(engine)):
        tokens = torch.from_numpy(text.tokens_T.astype(np.int64))
        with torch.no_grad():
            logprobs_TV = model(tokens[None]).logits[0].log_softmax(-1)
        asked = np.flatnonzero(text.weights_T)
        expected, _ = logprobs_TV[asked].topk(6)
        ids = torch.from_numpy(text.top_ids_TK[asked].astype(np.int64))
        torch.testing.assert_close(logprobs_TV[asked].gather(-1, ids), expected, atol=2e-4, rtol=0)
        found = torch.from_numpy(text.top_logprobs_TK[asked].astype(np.float32))
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
        if text.temperature == 0:
            answer = np.flatnonzero(text.weights_T == 1.0)
            assert (text.tokens_T[answer + 1] == text.top_ids_TK[answer, 0]).all()


def test_a_text_is_a_turn_and_its_answer(engine: Engine) -> None:
    texts = take_all(writer(engine))
    assert len(texts) == 12
    assert {text.temperature for text in texts} == set(TEMPERATURES)
    for text in texts:
        tokens = text.tokens_T.tolist()
        begin = int(np.flatnonzero(text.weights_T == 1.0)[0]) + 1
        assert tuple(tokens[:2]) == OPENING and tuple(tokens[begin - 2 : begin]) == BRIDGE
        assert begin - 2 > 2 and len(tokens) <= CONTEXT
        assert BRIDGE[0] not in tokens[2 : begin - 2]
        # What was given, the end of the bridge included, is not learned; nor behind the end.
        assert text.weights_T[0] == 0 and (text.weights_T[1 : begin - 3] == 0.25).all()
        assert (text.weights_T[begin - 1 : -1] == 1.0).all() and text.weights_T[-1] == 0


def test_without_turns_a_text_is_a_document(engine: Engine) -> None:
    for text in take_all(writer(engine, bridge=())):
        assert tuple(text.tokens_T[:2]) == OPENING
        assert (text.weights_T[1:-1] == 1.0).all()


def test_prompts_are_answered_and_never_learned(engine: Engine) -> None:
    prompts = ((40, 41, 42), (50, 51))
    texts = take_all(writer(engine, prompts=prompts))
    begins = [tuple(text.tokens_T[: 3 if text.tokens_T[0] == 40 else 2]) for text in texts]
    assert set(begins) == set(prompts)
    for text, begin in zip(texts, begins, strict=True):
        learned = np.flatnonzero(text.weights_T)
        assert learned[0] == len(begin) - 1 and (text.weights_T[learned] == 1.0).all()


def test_texts_depend_on_the_seed_alone(engine: Engine) -> None:
    def tokens(seed: int) -> set[tuple[int, ...]]:
        return {tuple(text.tokens_T) for text in take_all(writer(engine, seed=seed))}

    assert tokens(5) == tokens(5) != tokens(6)


def test_at_the_deadline_what_is_unfinished_waits(engine: Engine) -> None:
    ticks = itertools.count()
    made = writer(engine)
    first = made.take(10, monotonic=lambda: float(next(ticks)))
    assert 0 < len(first) < 12
    assert len(first) + len(take_all(made)) == 12
    assert engine.num_requests == 0


def test_closing_leaves_the_engine_empty(engine: Engine) -> None:
    # Prompts of different lengths do not reach the end of the context in one step.
    made = writer(engine, prompts=((40,), (41,) * 30))
    made.take(0)
    assert engine.num_requests > 0
    made.close()
    assert engine.num_requests == 0 and engine.check_integrity() == []


def test_a_target_that_writes_no_turn_is_named(engine: Engine) -> None:
    # Every turn is cut by the context, which leaves no room for an answer.
    with pytest.raises(InvalidRequestError, match="writes no turns"):
        take_all(writer(engine, context_tokens=18, opening=(20,) * 15))
