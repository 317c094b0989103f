"""Flags that benches share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path | None,
    typer.Option(help="Checkpoint directory; models/demo by default.", show_default=False),
]
Dtype = Annotated[str, typer.Option(help="f32, bf16 or int8.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Compute threads; all cores by default.", show_default=False),
]
PromptLen = Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")]
Seed = Annotated[int, typer.Option(help="Seed of the prompts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print nothing but the JSON line.")]
BatchInvariant = Annotated[
    bool,
    typer.Option("--batch-invariant", help="With numbers that do not depend on the batch."),
]


def num_threads(threads: int | None) -> int:
    """Return the threads asked for, else the cores this process may use."""
    return threads or len(os.sched_getaffinity(0))
