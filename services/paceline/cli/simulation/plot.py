"""Draws a run: what came, how many replicas there were, what TTFT that made."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paceline.autoscaler.values import POOLS
from paceline.cli.errors import CommandError
from paceline.cli.simulation.simulation import Outcome

_BIN_S = 10.0


def check_plot(path: Path | None) -> None:
    """Refuse a plot that could not be drawn, before anything takes time.

    Raises:
        CommandError: matplotlib is missing, or the directory.
    """
    if path is None:
        return
    if not path.resolve().parent.is_dir():
        raise CommandError(f"--plot: there is no directory {path.resolve().parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: pip install 'paceline[bench]'")


def draw_plot(runs: Sequence[tuple[str, Outcome]], path: Path) -> None:
    """Draw runs under one another.

    Raises:
        CommandError: the file cannot be written.
    """
    # Nobody else needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1 + 6.5 * len(runs)), layout="constrained")
    axes = figure.subplots(3 * len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for number, (name, outcome) in enumerate(runs):
        load, sizes, ttft = axes[3 * number : 3 * number + 3]
        _draw_load(load, outcome)
        load.set_title(name)
        _draw_sizes(sizes, outcome)
        _draw_ttft(ttft, outcome)
    axes[-1].set_xlabel("seconds")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write {path}: {error}") from error


def _draw_load(axes: Any, outcome: Outcome) -> None:
    num_bins = int(outcome.end_s / _BIN_S) + 1
    prompts, answers = [0.0] * num_bins, [0.0] * num_bins
    for request in outcome.requests:
        place = min(num_bins - 1, int(request.arrival.at_s / _BIN_S))
        prompts[place] += request.arrival.prompt_tokens / _BIN_S / 1e3
        answers[place] += request.arrival.output_tokens / _BIN_S / 1e3
    starts = [_BIN_S * i for i in range(num_bins)]
    axes.step(starts, prompts, where="post", linewidth=0.8, label="prompt")
    axes.step(starts, answers, where="post", linewidth=0.8, label="output")
    axes.set_ylabel("arriving\n1000 tokens/s")
    axes.legend(loc="upper right")


def _draw_sizes(axes: Any, outcome: Outcome) -> None:
    for place, role in enumerate(POOLS):
        own = [change for change in outcome.changes if change.role is role]
        times = [change.at_s for change in own] + [outcome.end_s]
        for kind, style in (("requested", ":"), ("ready", "-")):
            values = [getattr(change, kind) for change in own]
            axes.step(
                times,
                values + values[-1:],
                style,
                where="post",
                color=f"C{place}",
                linewidth=1.2,
                label=f"{role.value} {kind}",
            )
    most = max((change.requested for change in outcome.changes), default=0)
    # The legend needs a place.
    axes.set_ylim(0, 1.4 * max(1, most))
    axes.set_ylabel("replicas")
    axes.legend(loc="upper right", ncols=2)


def _draw_ttft(axes: Any, outcome: Outcome) -> None:
    served = [(r.arrival.at_s, r.ttft_s) for r in outcome.requests if r.ttft_s is not None]
    axes.plot([at for at, _ in served], [t for _, t in served], ".", markersize=2, color="C2")
    failed = [r.arrival.at_s for r in outcome.requests if r.failure]
    slo_s = outcome.options.slo_ttft_s
    if failed:
        axes.plot(failed, [slo_s] * len(failed), "x", markersize=4, color="C3", label="failed")
    axes.axhline(slo_s, color="black", linewidth=0.8, label="target")
    axes.set_yscale("log")
    axes.set_ylabel("TTFT, s")
    axes.legend(loc="upper right")
