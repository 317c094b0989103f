"""`paceline bench online`: what training while serving brings when the traffic changes.

Files of prompts are replayed as live traffic, one phase after the other, against a running
platform of its own for each arm: `off` (no speculation), `frozen` (the draft as it is) and
`online` (the draft trains). The platform is the one of `paceline up`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.bench import flags
from paceline.cli.bench.replay import ARMS, Arm, ReplayOptions, replay
from paceline.cli.bench.replay_report import Report, draw_plot, make_report, print_report
from paceline.cli.errors import CommandError, leave
from paceline.cli.up import find_model


def online(
    phases: Annotated[
        str,
        typer.Option(
            help="Files of JSON lines with prompt, messages or turns, by comma; one a phase.",
            metavar="A.jsonl,B.jsonl,...",
        ),
    ],
    model: flags.Model = None,
    draft: Annotated[
        Path | None, typer.Option(help="Draft to begin with; MODEL/draft by default.")
    ] = None,
    requests: Annotated[int, typer.Option(min=4, help="Requests of a phase.")] = 300,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 48,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 1,
    busy: Annotated[
        float,
        typer.Option(min=0.05, max=1.0, help="Share of the time in which a client waits."),
    ] = 0.5,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.0,
    drafter: Annotated[
        str, typer.Option(help="Who drafts; auto has those that look things up beside the model.")
    ] = "model",
    threads: flags.Threads = None,
    deepen: Annotated[int, typer.Option(min=0, help="Identity layers added.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG of acceptance over requests.")] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Replay phases of traffic with speculation off, with a frozen and with a learning draft."""
    try:
        options = ReplayOptions(
            model=find_model(model),
            draft=draft,
            phases=tuple(Path(name) for name in phases.split(",") if name),
            requests=requests,
            max_tokens=max_tokens,
            concurrency=concurrency,
            busy=busy,
            temperature=temperature,
            drafter=drafter,
            threads=flags.num_threads(threads),
            deepen=deepen,
        )
        if plot is not None and not plot.resolve().parent.is_dir():
            raise CommandError(f"--plot: there is no directory {plot.resolve().parent}")
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise CommandError("--plot needs matplotlib: pip install 'paceline[bench]'")
        report = asyncio.run(_run(options, is_quiet=as_json))
        if plot is not None:
            draw_plot(report, plot)
        if not as_json:
            print_report(report)
        print(json.dumps(report.to_json()), flush=True)
    except CommandError as error:
        leave("bench online", error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


async def _run(options: ReplayOptions, *, is_quiet: bool) -> Report:
    def say(text: str) -> None:
        if not is_quiet:
            print(text, file=sys.stderr, flush=True)

    arms: dict[str, Arm] = {}
    for name in ARMS:
        with tempfile.TemporaryDirectory(prefix="paceline-online-") as directory:
            say(f"{name}: starting a platform")
            arms[name] = await replay(options, name, Path(directory), say)
    return make_report(arms, {k: _plain(v) for k, v in asdict(options).items()})


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return str(value) if isinstance(value, Path) else value
