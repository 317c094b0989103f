"""Makes a stream to compare ways of learning on: what a fleet would have captured, without one.

The target answers prompts one after the other (writer.py); origins are those that a chain of four
tokens of the draft would have led to. Verification draws every token from the target itself, so a
drafted token is accepted exactly where it is the drawn one:

    drawn     a b c d e | f g | h ...
    drafted   a b c d     f x   h
    origin    1 1 1 1 3   1 2   1

With hidden states the samples are those that the engine captures (engine/spec/capture.py), which
passes over what it has no time for when steps are as short as capturing.
compare.py learns from it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from paceline.domain.learnings import Sample, TokenOrigin
from paceline.engine.build import build_engine
from paceline.engine.options import EngineOptions
from paceline.trainer.checkpoint import load_draft
from paceline.trainer.compare_options import RecordOptions
from paceline.trainer.decoder import DraftModel
from paceline.trainer.stream_file import write_stream
from paceline.trainer.texts import Text, pack
from paceline.trainer.train import learned_logits
from paceline.trainer.writer import TargetWriter, WriterPlan

_TOP = 32
_RUN_TOKENS = 64
"""Captured tokens of a sample; a longer answer gives several."""
_CONTEXT_TOKENS = 128
"""Most tokens before them."""
_CHAIN = 4


def record(options: RecordOptions) -> dict[str, Any]:
    """Write the stream and return a report.

    Raises:
        ValueError: a prompt leaves no room for an answer.
        OSError: a file cannot be read or written.
    """
    lines = json.loads(Path(options.prompts).read_text(encoding="utf-8"))
    prompts = [tuple(line["token_ids"]) for line in lines]
    answers = _answers(options, prompts)
    draft = load_draft(Path(options.draft))
    torch.set_num_threads(options.threads)
    domains = {prompt: line["domain"] for prompt, line in zip(prompts, lines, strict=True)}
    order = {prompt: i for i, prompt in enumerate(prompts)}
    answers.sort(key=lambda answer: order[_prompt(answer[0])])
    samples: list[Sample] = []
    for text, captured in answers:
        domain, origins_N = domains[_prompt(text)], _origins(text, draft)
        samples += (
            _with_origins(text, captured, origins_N, domain)
            if options.has_hidden
            else _samples(text, origins_N, domain)
        )
    count = write_stream(Path(options.out), samples)
    all_N = np.frombuffer(b"".join(sample.origins for sample in samples), np.uint8)
    shares = {o.name.lower(): round(float((all_N == o).mean()), 4) for o in TokenOrigin}
    return {
        "bench": "training-record",
        "stream": options.out,
        "samples": count,
        "tokens": len(all_N),
        "has_hidden": options.has_hidden,
        "origins": shares,
    }


def _answers(
    options: RecordOptions, prompts: Sequence[tuple[int, ...]]
) -> list[tuple[Text, list[Sample]]]:
    """Return the target's answers, each with what the engine captured of it."""
    longest = max(map(len, prompts)) + options.max_tokens
    block_size = EngineOptions(options.model).block_size
    engine, card = build_engine(
        EngineOptions(
            model=options.model,
            dtype=options.dtype,
            num_kv_blocks=longest // block_size + 2,
            max_num_seqs=1,
            threads=options.threads,
            drafters=(),
            capture_share=1.0 if options.has_hidden else 0.0,
            capture_top=_TOP,
            capture_hidden=options.has_hidden,
        )
    )
    if longest > card.max_context_tokens:
        raise ValueError(f"a prompt and {options.max_tokens} tokens are {longest} tokens")
    answers: list[tuple[Text, list[Sample]]] = []
    # One by one: a writer fills its context whatever the prompt's length.
    for prompt in prompts:
        plan = WriterPlan(
            opening=(),
            bridge=(),
            prompts=(prompt,),
            context_tokens=len(prompt) + options.max_tokens,
            concurrency=1,
            top=min(_TOP, card.config.vocab_size),
            turn_weight=0.0,
            eos_token_ids=card.config.eos_token_ids,
            seed=options.seed + len(answers),
            num_texts=1,
            temperatures=(options.temperatures[len(answers) % len(options.temperatures)],),
            is_captured=options.has_hidden,
        )
        writer = TargetWriter(engine, plan)
        (text,) = writer.take(float("inf"))
        answers.append((text, writer.captured()))
        if not options.is_quiet and len(answers) % 50 == 0:
            print(f"{len(answers)} of {len(prompts)} prompts", flush=True)
    return answers


def _prompt(text: Text) -> tuple[int, ...]:
    first = int(text.weights_T.nonzero()[0][0])
    return tuple(text.tokens_T[: first + 1].tolist())


def _origins(text: Text, draft: DraftModel) -> npt.NDArray[np.uint8]:
    """Return how each token of an answer would have come about."""
    with torch.no_grad():
        logits_NV = learned_logits(draft, pack([[text]], len(text.tokens_T)))
    return origins(logits_NV.argmax(-1).numpy(), text.tokens_T[len(_prompt(text)) :])


def _with_origins(
    text: Text, captured: Sequence[Sample], origins_N: npt.NDArray[np.uint8], domain: str
) -> list[Sample]:
    """Return what was captured of an answer, with what a draft would have made of it."""
    found = []
    for sample in captured:
        begin = sample.first_position + sample.num_context - len(_prompt(text))
        own_N = origins_N[begin : begin + sample.num_captured]
        found.append(replace(sample, tenant=b"", domain=domain, origins=own_N.tobytes()))
    return found


def _samples(text: Text, origins_N: npt.NDArray[np.uint8], domain: str) -> list[Sample]:
    begin, end = len(_prompt(text)), len(text.tokens_T)
    found = []
    for at in range(begin, end, _RUN_TOKENS):
        stop = min(at + _RUN_TOKENS, end)
        start = max(0, at - _CONTEXT_TOKENS)
        probs_NK = np.exp(text.top_logprobs_TK[at - 1 : stop - 1].astype(np.float32))
        found.append(
            Sample(
                tenant=b"",
                domain=domain,
                draft_version="",
                temperature=text.temperature,
                first_position=start,
                token_ids=tuple(text.tokens_T[start:stop].tolist()),
                num_context=at - start,
                top=probs_NK.shape[1],
                top_ids=text.top_ids_TK[at - 1 : stop - 1].astype("<i4").tobytes(),
                top_probs=probs_NK.astype("<f2").tobytes(),
                tail_mass=(1.0 - probs_NK.sum(-1)).clip(0.0).astype("<f2").tobytes(),
                origins=origins_N[at - begin : stop - begin].tobytes(),
            )
        )
    return found


def origins(
    guesses_N: npt.NDArray[np.int64], tokens_N: npt.NDArray[np.int32]
) -> npt.NDArray[np.uint8]:
    """Return how each token comes about when chains of the draft's guesses are verified."""
    found: list[TokenOrigin] = []
    run = 0
    for guess, token in zip(guesses_N, tokens_N, strict=True):
        if run == _CHAIN:
            found.append(TokenOrigin.BONUS)
            run = 0
        elif guess == token:
            found.append(TokenOrigin.ACCEPTED)
            run += 1
        else:
            found.append(TokenOrigin.CORRECTED)
            run = 0
    return np.array(found, np.uint8)
