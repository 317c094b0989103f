"""`paceline bench engine`: prefill and decode rates; engine/bench/generation.py defines them."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline.cli.bench import flags
from paceline.cli.bench.child import run_bench
from paceline.cli.errors import CommandError, leave
from paceline.cli.up import find_model
from paceline.engine.bench.options import BenchOptions


def engine(
    model: flags.Model = None,
    dtype: flags.Dtype = "f32",
    prompt_len: flags.PromptLen = 512,
    gen_len: Annotated[int, typer.Option(min=1, help="Tokens generated for each prompt.")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests, submitted at once.")] = 1,
    threads: flags.Threads = None,
    seed: flags.Seed = 0,
    batch_invariant: flags.BatchInvariant = False,
) -> None:
    """Measure prefill and decode rate of the engine, without gRPC."""
    try:
        options = BenchOptions(
            model=str(find_model(model)),
            dtype=dtype,
            threads=flags.num_threads(threads),
            prompt_len=prompt_len,
            gen_len=gen_len,
            concurrency=concurrency,
            seed=seed,
            batch_invariant=batch_invariant,
        )
        exit_code = run_bench("engine", options)
    except CommandError as error:
        leave("bench engine", error)
    raise typer.Exit(exit_code)
