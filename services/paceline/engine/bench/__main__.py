"""Runs one bench by name and prints its report as the last line."""

from __future__ import annotations

import importlib
import json
import sys

from paceline.domain.errors import PacelineError
from paceline.engine.bench.neighbours import Neighbours
from paceline.engine.bench.options import BenchOptions, SpecOptions

_BENCHES: dict[str, tuple[str, str, type[BenchOptions]]] = {
    "engine": ("generation", "bench_generation", BenchOptions),
    "cost": ("cost", "bench_cost", BenchOptions),
    "chunking": ("chunking", "bench_chunking", BenchOptions),
    "roofline": ("roofline", "bench_roofline", BenchOptions),
    "spec": ("spec", "bench_spec", SpecOptions),
}
"""Name of a bench to module, function and options; imported when asked for."""


def main(argv: list[str]) -> int:
    """Run a bench; return the exit code."""
    name, options = argv
    module, function, kind = _BENCHES[name]
    bench = getattr(importlib.import_module(f"paceline.engine.bench.{module}"), function)
    neighbours = Neighbours()
    try:
        report = bench(kind.from_json(options))
    except (PacelineError, ValueError, OSError) as error:
        print(f"paceline bench {name}: {error}", file=sys.stderr, flush=True)
        return 1
    print(json.dumps({**report, "other_cpu_share": neighbours.cpu_share()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
