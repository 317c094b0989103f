"""Puts an engine together from a checkpoint: model, page pool, scheduler, measured cost."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from paceline import __version__
from paceline.domain.blocks import chain_root
from paceline.domain.cost import StepCost
from paceline.domain.directories import cache_directory
from paceline.engine import kernels
from paceline.engine.blocks import BlockPool
from paceline.engine.chunking import StepPace
from paceline.engine.cost import MAX_TIMED_CONTEXT, known_step_cost
from paceline.engine.cost_store import CostKey, CostStore, processor_fingerprint
from paceline.engine.engine import Engine
from paceline.engine.models.config import ModelConfig, load_model_config
from paceline.engine.models.deepen import deepen_config
from paceline.engine.models.load import KV_DTYPES, ModelOptions, load_model
from paceline.engine.options import EngineOptions
from paceline.engine.paced_runner import PacedRunner
from paceline.engine.probe import StepTimer
from paceline.engine.runner import Runner
from paceline.engine.scheduler import Scheduler
from paceline.engine.spec.assemble import check_options, make_bank, make_speculator
from paceline.engine.spec.capture import Capture
from paceline.engine.spec.speculator import Speculator
from paceline.engine.weights import model_digest


@dataclass(frozen=True, slots=True)
class EngineCard:
    """What an engine serves and how its KV is laid out."""

    config: ModelConfig
    model_digest: str
    kv_root: bytes
    dtype: str
    block_size: int
    block_bytes: int
    num_kv_blocks: int
    max_context_tokens: int
    step_cost: StepCost
    drafters: tuple[str, ...] = ()
    """Drafters that requests may name."""
    draft_version: str = ""
    """Version of the draft model, if there is one."""


def build_engine(options: EngineOptions) -> tuple[Engine, EngineCard]:
    """Load the checkpoint and return a ready engine.

    Raises:
        UnsupportedModelError: the checkpoint cannot be served; names what is wrong.
        ValueError: an option is out of range.
    """
    _check_options(options)
    directory, dtype = Path(options.model), KV_DTYPES[options.dtype]
    config = load_model_config(directory)
    if options.deepen:
        config = deepen_config(config, options.deepen)
    num_pages = _num_pages(options, config, dtype)
    # One sequence must always fit alone, else preemption could not help it.
    max_context = min(config.max_context_tokens, num_pages * options.block_size)
    model = load_model(
        directory,
        config,
        ModelOptions(
            options.dtype,
            options.block_size,
            max_context,
            options.threads,
            batch_invariant=options.batch_invariant,
            extra_layers=options.deepen,
        ),
    )
    runner = Runner(model, num_pages=num_pages, block_size=options.block_size, dtype=dtype)
    digest = model_digest(directory)
    if options.deepen:
        digest = f"{digest}+{options.deepen}"
    cost = _step_cost(options, runner, digest, num_pages, max_context)
    root = chain_root(digest, options.dtype, options.block_size)
    scheduler = Scheduler(
        BlockPool(num_pages),
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        step_tokens=options.chunk_tokens,
        max_context_tokens=max_context,
        eos_token_ids=frozenset(config.eos_token_ids),
        pace=StepPace(cost, options.mixed_step_ratio),
    )
    speculator = make_speculator(
        options,
        cost,
        runner.lend(scheduler.pool, max_context_tokens=max_context),
    )
    engine = Engine(
        PacedRunner(runner, options.min_step_s) if options.min_step_s else runner,
        scheduler,
        kv_root=root,
        vocab_size=config.vocab_size,
        monotonic=time.monotonic,
        speculator=speculator,
        capture=_capture(options, config.vocab_size, speculator),
        bank=make_bank(options, speculator),
    )
    card = EngineCard(
        config=config,
        model_digest=digest,
        kv_root=root,
        dtype=options.dtype,
        block_size=options.block_size,
        block_bytes=runner.page_bytes,
        num_kv_blocks=num_pages,
        max_context_tokens=max_context,
        step_cost=cost,
        drafters=() if speculator is None else speculator.arms,
        draft_version="" if speculator is None else speculator.version,
    )
    return engine, card


def _capture(
    options: EngineOptions, vocab_size: int, speculator: Speculator | None
) -> Capture | None:
    if not options.capture_share:
        return None

    def version_of(sequence_id: int) -> str:
        return "" if speculator is None else speculator.drafted_by(sequence_id)

    return Capture(
        share=options.capture_share,
        top=min(options.capture_top, vocab_size),
        hidden=options.capture_hidden,
        version_of=version_of,
    )


def _step_cost(
    options: EngineOptions, runner: Runner, digest: str, num_pages: int, max_context_tokens: int
) -> StepCost:
    """Return what steps take: as kept since an earlier start, or measured now."""
    key = CostKey(
        model_digest=digest,
        dtype=options.dtype,
        machine=processor_fingerprint(),
        threads=options.threads,
        backend=f"paceline {__version__}, torch {torch.__version__}, "
        f"{kernels.backend()} {kernels.build_id()}",
        block_size=options.block_size,
        chunk_tokens=options.chunk_tokens,
        max_context_tokens=min(max_context_tokens, MAX_TIMED_CONTEXT),
        batch_invariant=options.batch_invariant,
    )
    timer = StepTimer(runner, num_pages=num_pages, block_size=options.block_size)
    cost = known_step_cost(CostStore(cache_directory(os.environ)), key, timer)
    return replace(cost, floor_s=options.min_step_s)


def _check_options(options: EngineOptions) -> None:
    check_options(options)
    if options.dtype not in KV_DTYPES:
        raise ValueError(f"dtype {options.dtype!r}: expected one of {sorted(KV_DTYPES)}")
    for name in (
        "block_size",
        "chunk_tokens",
        "max_num_seqs",
        "threads",
        "kv_memory_mb",
        "capture_top",
    ):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} {getattr(options, name)}: expected at least 1")
    if options.mixed_step_ratio < 1:
        raise ValueError(f"mixed_step_ratio {options.mixed_step_ratio}: expected at least 1")
    if not options.min_step_s >= 0:
        raise ValueError(f"min_step_s {options.min_step_s}: expected at least 0")
    if not 0 <= options.capture_share <= 1:
        raise ValueError(f"capture_share {options.capture_share}: expected in [0, 1]")


def _num_pages(options: EngineOptions, config: ModelConfig, dtype: torch.dtype) -> int:
    if options.num_kv_blocks is not None:
        num_pages = options.num_kv_blocks
    else:
        per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
        num_pages = (options.kv_memory_mb << 20) // (per_token * options.block_size)
    if num_pages < 2:
        raise ValueError(f"{num_pages} KV blocks: at least 2 are needed")
    return num_pages
