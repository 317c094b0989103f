"""`paceline bench training`: which way of online learning brings most acceptance, on one stream.

Also which kind of draft: a small model and Medusa heads, trained for the same time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.bench import flags
from paceline.cli.bench.spec import draft_of, read_prompts
from paceline.cli.errors import CommandError, leave
from paceline.cli.fleet_plan import with_threads
from paceline.cli.up import find_model
from paceline.trainer.compare_options import CompareOptions, RecordOptions, to_json


def training(
    stream: Annotated[
        Path | None,
        typer.Option(help="Recorded samples to learn from.", show_default=False),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="File to record a stream to instead.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="For --record: JSON lines as of bench spec.", show_default=False),
    ] = None,
    model: flags.Model = None,
    draft: Annotated[
        Path | None,
        typer.Option(help="Draft model; the model's own draft/ by default.", show_default=False),
    ] = None,
    drafter: Annotated[
        str, typer.Option(help="Drafts to compare, by commas: model, medusa.")
    ] = "model",
    heads: Annotated[
        Path | None,
        typer.Option(
            help="Medusa heads to start from; by default ones that have learned nothing.",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[
        int, typer.Option(min=1, max=16, help="Tokens of judged chains; heads of a new set.")
    ] = 4,
    losses: Annotated[str, typer.Option(help="Losses to compare, by commas.")] = (
        "forward-kl,lk,total-variation"
    ),
    positions: Annotated[str, typer.Option(help="Positions to compare, by commas.")] = (
        "all,accepted,first-rejected"
    ),
    rates: Annotated[str, typer.Option(help="Learning rates to compare, by commas.")] = "2e-4",
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Time for all; by default the whole stream.", show_default=False
        ),
    ] = None,
    ratio: Annotated[
        float, typer.Option(min=0.0, help="Tokens learned for each one that arrives.")
    ] = 2.0,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Training time of each way, instead of --ratio.", show_default=False
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Tokens behind one optimiser step; by default what is usual for each draft.",
            show_default=False,
        ),
    ] = None,
    hidden: Annotated[
        bool, typer.Option("--hidden", help="For --record: hidden states too, for heads.")
    ] = False,
    temperatures: Annotated[
        str, typer.Option(help="For --record: of the answers, in turn.")
    ] = "0,0.6,1",
    max_tokens: Annotated[
        int, typer.Option(min=1, help="For --record: generated for each prompt.")
    ] = 128,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="For --record: prompts taken.", show_default=False),
    ] = None,
    dtype: flags.Dtype = "f32",
    threads: flags.Threads = None,
    seed: flags.Seed = 0,
    as_json: flags.AsJson = False,
) -> None:
    """Compare losses, positions and rates of online training on one stream of samples."""
    try:
        directory = find_model(model)
        own = draft_of(directory, draft)
        if own is None:
            raise CommandError("--draft: the model has none of its own, so name one")
        num_threads = flags.num_threads(threads)
        if record is not None:
            if prompts is None:
                raise CommandError("--record needs --prompts")
            lines = read_prompts(prompts, directory, limit)
            with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
                json.dump(lines, file)
                file.flush()
                exit_code = _run(
                    RecordOptions(
                        model=str(directory),
                        draft=own,
                        prompts=file.name,
                        out=str(record),
                        temperatures=_numbers("temperatures", temperatures),
                        max_tokens=max_tokens,
                        has_hidden=hidden,
                        dtype=dtype,
                        threads=num_threads,
                        seed=seed,
                        is_quiet=as_json,
                    )
                )
        elif stream is not None:
            exit_code = _run(
                CompareOptions(
                    stream=str(stream),
                    draft=own,
                    drafters=tuple(drafter.split(",")),
                    target=str(directory),
                    heads="" if heads is None else str(heads),
                    depth=depth,
                    losses=tuple(losses.split(",")),
                    positions=tuple(positions.split(",")),
                    learning_rates=_numbers("rates", rates),
                    minutes=minutes,
                    learned_ratio=ratio,
                    seconds=seconds,
                    batch_tokens=batch_tokens,
                    threads=num_threads,
                    seed=seed,
                    is_quiet=as_json,
                )
            )
        else:
            raise CommandError("name a --stream to learn from, or --record one")
    except CommandError as error:
        leave("bench training", error)
    raise typer.Exit(exit_code)


def _run(options: RecordOptions | CompareOptions) -> int:
    if importlib.util.find_spec("torch") is None:
        raise CommandError("the trainer is not installed: pip install 'paceline[trainer]'")
    # Numeric libraries size their thread pools when they load, before any option is read.
    environ = with_threads(os.environ, options.threads)
    command = [sys.executable, "-m", "paceline.trainer.compare", to_json(options)]
    return subprocess.run(command, env=environ, check=False).returncode


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise CommandError(f"--{flag}: {error}") from error
