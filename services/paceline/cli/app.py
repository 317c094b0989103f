"""The command tree: names, order and `--version`. Each command lives in a file of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline import __version__
from paceline.cli.autoscaler import autoscaler
from paceline.cli.bench import bench
from paceline.cli.demo import demo
from paceline.cli.draft import draft
from paceline.cli.generate import generate
from paceline.cli.simulate import simulate
from paceline.cli.status import status
from paceline.cli.up import up

app = typer.Typer(
    name="paceline",
    help="Paceline: LLM serving on one machine or many.",
    epilog="Start with [bold]paceline up[/], then [bold]paceline generate[/] in another terminal.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"paceline {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    del version


app.command()(up)
app.command()(generate)
app.command()(status)
app.command()(demo)
app.command()(simulate)
app.add_typer(bench)
app.add_typer(draft)
app.add_typer(autoscaler)
