"""`paceline bench roofline`: predicted, measured and possible speed, side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline.cli.bench import flags
from paceline.cli.bench.child import run_bench
from paceline.cli.errors import CommandError, leave
from paceline.cli.up import find_model
from paceline.engine.bench.options import BenchOptions


def roofline(
    model: flags.Model = None,
    dtype: flags.Dtype = "f32",
    prompt_len: flags.PromptLen = 512,
    gen_len: Annotated[int, typer.Option(min=2, help="Tokens generated for each prompt.")] = 64,
    threads: flags.Threads = None,
    seed: flags.Seed = 0,
    batch_invariant: flags.BatchInvariant = False,
    as_json: flags.AsJson = False,
) -> None:
    """Compare the engine with what the machine's memory and arithmetic allow."""
    try:
        options = BenchOptions(
            model=str(find_model(model)),
            dtype=dtype,
            threads=flags.num_threads(threads),
            prompt_len=prompt_len,
            gen_len=gen_len,
            seed=seed,
            batch_invariant=batch_invariant,
            is_quiet=as_json,
        )
        exit_code = run_bench("roofline", options)
    except CommandError as error:
        leave("bench roofline", error)
    raise typer.Exit(exit_code)
