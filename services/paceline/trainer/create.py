"""Makes a first draft model for a target: the target writes, a small model learns it by heart.

Run as `python -m paceline.trainer.create` with CreateOptions on standard input; it prints its
progress and, last, the card as JSON. cli/draft.py starts it. The draft appears whole or not at
all, so a process that ends early leaves nothing.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from paceline import __version__
from paceline.domain.errors import InvalidRequestError, PacelineError
from paceline.engine.build import EngineCard, build_engine
from paceline.engine.engine import Engine
from paceline.engine.models.config import load_model_config
from paceline.engine.options import EngineOptions
from paceline.process.lifecycle import exit_with_parent
from paceline.trainer.checkpoint import (
    borrow_embedding,
    check_place,
    save_draft,
    target_head,
)
from paceline.trainer.decoder import DraftModel
from paceline.trainer.distil import POOL_BYTES, Clock, Monotonic, Say, distil
from paceline.trainer.evaluate import Agreement, measure
from paceline.trainer.options import CreateOptions
from paceline.trainer.sizes import check_memory, draft_shape
from paceline.trainer.texts import Text
from paceline.trainer.writer import TargetWriter, WriterPlan

_TOP = 128
"""Tokens of the target's distribution that training texts name."""
_HELD_OUT_TOP = 4096
"""The same for held-out texts, whose overlap must be all but exact."""
_NUM_HELD_OUT = 32
"""Texts; all are begun at once and waited for, as the first ones to end are the short ones."""
_HELD_OUT_SHARE = 0.2
"""Most of the time that writing them may take."""
_HELD_OUT_EVERY = 20
"""One prompt in so many is kept for measuring."""
_TURN_WEIGHT = 1.0
"""A turn of the user teaches as much of the language as an answer: with 0.1 the agreement was
0.02 lower after half a million tokens."""
_LEAST_CONTEXT = 64
"""Tokens in which a turn and an answer have room."""
_MEMINFO = Path("/proc/meminfo")


def create_draft(
    options: CreateOptions, say: Say, monotonic: Monotonic = time.monotonic
) -> dict[str, Any]:
    """Make a draft and return its card.

    Raises:
        InvalidRequestError: an option is out of range, or memory does not suffice.
        UnsupportedModelError: the target cannot be served.
        OSError: the draft cannot be written.
    """
    _check(options)
    target, out = Path(options.target), Path(options.out)
    check_place(out, options.overwrite)
    config = load_model_config(target)
    shape = draft_shape(config, options.num_layers, options.hidden_size)
    check_memory(
        target, shape, batch_tokens=options.batch_tokens, pool_bytes=POOL_BYTES, meminfo=_MEMINFO
    )
    engine, engine_card = _engine(options)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = DraftModel(shape)
    borrow_embedding(model, target_head(target))
    say(f"draft of {shape.num_parameters:,} weights, width {shape.hidden_size}")
    end_s = monotonic() + 60.0 * options.minutes
    held_out = _held_out(options, engine, engine_card, monotonic)
    measured_s = monotonic()
    untrained = measure(model, held_out)
    begin_s = monotonic()
    # What the first measure took, the last one will.
    clock = Clock(begin_s, end_s - (begin_s - measured_s), monotonic)
    writer = TargetWriter(engine, _plan(options, engine_card, is_held_out=False))
    totals = distil(options, model, writer, held_out, clock, say)
    trained = measure(model, held_out)
    card = {
        "format": 1,
        "target_digest": engine_card.model_digest,
        "seed": options.seed,
        "minutes": options.minutes,
        "threads": options.threads,
        "command": options.command,
        "paceline": __version__,
        "num_parameters": shape.num_parameters,
        **asdict(totals),
        "held_out": _figures(trained),
        "held_out_untrained": _figures(untrained),
    }
    save_draft(model, target, config, out, card)
    return card


def _held_out(
    options: CreateOptions, engine: Engine, card: EngineCard, monotonic: Monotonic
) -> list[Text]:
    """Let the target write texts for measuring only."""
    writer = TargetWriter(engine, _plan(options, card, is_held_out=True))
    deadline_s = monotonic() + _HELD_OUT_SHARE * 60.0 * options.minutes
    texts = writer.take(deadline_s, monotonic)
    writer.close()
    return texts


def _plan(options: CreateOptions, card: EngineCard, *, is_held_out: bool) -> WriterPlan:
    # Of a longer one no answer would be left to learn from.
    prompts = tuple(p for p in options.prompts if len(p) < options.context_tokens)
    count = len(prompts)
    if count > 1:
        held = set(range(0, count, _HELD_OUT_EVERY))
        prompts = tuple(prompts[i] for i in range(count) if (i in held) == is_held_out)
    return WriterPlan(
        opening=options.opening,
        bridge=options.bridge,
        prompts=prompts,
        context_tokens=min(options.context_tokens, card.max_context_tokens),
        concurrency=options.concurrency,
        top=min(_HELD_OUT_TOP if is_held_out else _TOP, card.config.vocab_size),
        turn_weight=_TURN_WEIGHT,
        eos_token_ids=card.config.eos_token_ids,
        seed=2 * options.seed + is_held_out,
        num_texts=_NUM_HELD_OUT if is_held_out else None,
    )


def _engine(options: CreateOptions) -> tuple[Engine, EngineCard]:
    block_size = EngineOptions(options.target).block_size
    pages = options.concurrency * (options.context_tokens // block_size + 2)
    return build_engine(
        EngineOptions(
            model=options.target,
            dtype=options.dtype,
            num_kv_blocks=pages,
            max_num_seqs=options.concurrency,
            threads=options.threads,
            # Drafts come when they come; a text must depend on the seed alone.
            drafters=(),
        )
    )


def _check(options: CreateOptions) -> None:
    if not 0 < options.minutes < float("inf"):
        raise InvalidRequestError("minutes", f"minutes {options.minutes}: expected more than 0")
    least = {"threads": 1, "concurrency": 1, "num_layers": 1, "batch_tokens": 1}
    for name, bound in {**least, "context_tokens": _LEAST_CONTEXT}.items():
        value = getattr(options, name)
        if value < bound:
            raise InvalidRequestError(name, f"{name} {value}: expected at least {bound}")
    width = options.hidden_size
    if width is not None and (width < 4 or width % 4):
        raise InvalidRequestError("hidden_size", f"hidden size {width}: expected a multiple of 4")
    if options.prompts and min(map(len, options.prompts)) >= options.context_tokens:
        raise InvalidRequestError(
            "prompts", f"no prompt is shorter than {options.context_tokens} tokens"
        )
    if not options.prompts and not options.opening:
        raise InvalidRequestError(
            "prompts", "the target has no token that begins a text; name prompts"
        )


def _figures(found: Agreement) -> dict[str, float | int]:
    return {
        "greedy_agreement": round(found.greedy, 4),
        "overlap": round(found.overlap, 4),
        "positions": found.num_positions,
    }


class _Interrupted(BaseException):
    """A signal asks for the end.

    Not KeyboardInterrupt: once that has passed through an `exec` of text, as of a dataclass in
    an import, CPython ends the process by SIGINT, whatever code it leaves with.
    """


def main() -> int:
    """Run one job; return the exit code."""

    def leave(number: int, frame: FrameType | None) -> None:
        del number, frame
        for again in (signal.SIGINT, signal.SIGTERM):
            # What is cleaned up must not be interrupted too.
            signal.signal(again, signal.SIG_IGN)
        raise _Interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    exit_with_parent()
    try:
        options = CreateOptions.from_json(sys.stdin.read())
        card = create_draft(options, lambda line: print(line, flush=True))
    except (PacelineError, ValueError, OSError) as error:
        print(f"paceline draft create: {error}", file=sys.stderr, flush=True)
        return 1
    except _Interrupted:
        print("paceline draft create: interrupted, nothing was saved", file=sys.stderr, flush=True)
        return 130
    print(json.dumps(card), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
