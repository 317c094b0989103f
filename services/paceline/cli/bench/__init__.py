"""`paceline bench`: what this machine and this build can do, as numbers.

One file per bench. The measuring happens in a process of its own (paceline/engine/bench),
which child.py starts; nothing here reaches torch. `autoscale` measures nothing: it simulates.
"""

from __future__ import annotations

import typer

from paceline.cli.bench.autoscale import autoscale
from paceline.cli.bench.chunking import chunking
from paceline.cli.bench.cost import cost
from paceline.cli.bench.engine import engine
from paceline.cli.bench.online import online
from paceline.cli.bench.roofline import roofline
from paceline.cli.bench.spec import spec
from paceline.cli.bench.training import training

bench = typer.Typer(
    name="bench",
    help="Measure the engine; the last line printed is JSON.",
    no_args_is_help=True,
)
bench.command()(engine)
bench.command()(cost)
bench.command()(chunking)
bench.command()(roofline)
bench.command()(spec)
bench.command()(online)
bench.command()(training)
bench.command()(autoscale)

__all__ = ["bench"]
