"""Starts a bench's process and waits for it; its output is the command's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

from paceline.cli.errors import CommandError
from paceline.cli.fleet_plan import with_threads
from paceline.engine.bench.options import BenchOptions


def run_bench(name: str, options: BenchOptions) -> int:
    """Run a bench to its end and return its exit code.

    Raises:
        CommandError: this installation has no engine.
    """
    if importlib.util.find_spec("torch") is None:
        raise CommandError("the engine is not installed: pip install 'paceline[worker]'")
    # Numeric libraries size their thread pools when they load, before any option is read.
    environ = with_threads(os.environ, options.threads)
    command = [sys.executable, "-m", "paceline.engine.bench", name, options.to_json()]
    return subprocess.run(command, env=environ, check=False).returncode
