"""`paceline bench chunking`: what a long prompt does to the streams beside it."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline.cli.bench import flags
from paceline.cli.bench.child import run_bench
from paceline.cli.errors import CommandError, leave
from paceline.cli.up import find_model
from paceline.engine.bench.options import BenchOptions


def chunking(
    model: flags.Model = None,
    dtype: flags.Dtype = "f32",
    streams: Annotated[int, typer.Option(min=1, help="Streams that decode.")] = 8,
    prompt_len: flags.PromptLen = 2048,
    threads: flags.Threads = None,
    seed: flags.Seed = 0,
    batch_invariant: flags.BatchInvariant = False,
    as_json: flags.AsJson = False,
) -> None:
    """Measure the gaps of decoding streams while a long prompt is computed."""
    try:
        options = BenchOptions(
            model=str(find_model(model)),
            dtype=dtype,
            threads=flags.num_threads(threads),
            prompt_len=prompt_len,
            concurrency=streams,
            seed=seed,
            batch_invariant=batch_invariant,
            is_quiet=as_json,
        )
        exit_code = run_bench("chunking", options)
    except CommandError as error:
        leave("bench chunking", error)
    raise typer.Exit(exit_code)
