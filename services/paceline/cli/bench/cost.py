"""`paceline bench cost`: how far predicted step times are off."""

from __future__ import annotations

import typer

from paceline.cli.bench import flags
from paceline.cli.bench.child import run_bench
from paceline.cli.errors import CommandError, leave
from paceline.cli.up import find_model
from paceline.engine.bench.options import BenchOptions


def cost(
    model: flags.Model = None,
    dtype: flags.Dtype = "f32",
    threads: flags.Threads = None,
    seed: flags.Seed = 0,
    batch_invariant: flags.BatchInvariant = False,
    as_json: flags.AsJson = False,
) -> None:
    """Compare predicted step times with measured ones on steps that were not fitted."""
    try:
        options = BenchOptions(
            model=str(find_model(model)),
            dtype=dtype,
            threads=flags.num_threads(threads),
            seed=seed,
            batch_invariant=batch_invariant,
            is_quiet=as_json,
        )
        exit_code = run_bench("cost", options)
    except CommandError as error:
        leave("bench cost", error)
    raise typer.Exit(exit_code)
