"""What the arms of `paceline bench online` brought: figures by phase, a table, a plot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.cli.bench.replay import Arm, Asked
from paceline.cli.errors import CommandError

_WINDOW = 20
"""Requests of a moving mean."""
_SETTLED = 0.95
"""Of the acceptance at a phase's end that counts as recovered."""


@dataclass(frozen=True, slots=True)
class Report:
    """All arms, and what follows."""

    arms: Mapping[str, Arm]
    options: Mapping[str, object]

    def to_json(self) -> dict[str, Any]:
        """Return the keys of the bench."""
        online = self.arms["online"]
        phases = sorted({asked.phase for asked in online.asked})
        return {
            **{
                name: [figures([a for a in arm.asked if a.phase == p]) for p in phases]
                for name, arm in self.arms.items()
            },
            "requests_to_recover": requests_to_recover(online.asked, phases),
            "swaps": online.swaps,
            "max_swap_stall_s": round(online.max_swap_stall_s, 6),
            "rollbacks": online.rollbacks,
            "forgetting": forgetting(online.asked, self.options["phases"]),
            "spare_share": None if online.spare_share is None else round(online.spare_share, 4),
            "trained_s": round(online.trained_s, 2),
            "identical_to_off": all(
                _outputs(arm) == _outputs(self.arms["off"]) for arm in self.arms.values()
            ),
            **self.options,
        }


def make_report(arms: Mapping[str, Arm], options: Mapping[str, object]) -> Report:
    """Return the report of all arms."""
    return Report(arms, options)


def figures(asked: Sequence[Asked]) -> dict[str, float]:
    """Return the figures of a phase; `_end` are those of its last quarter."""
    last = asked[-max(1, len(asked) // 4) :]
    steps = sum(a.target_steps for a in asked)
    return {
        "acceptance": round(acceptance(asked), 4),
        "emitted_per_step": round(sum(a.num_tokens for a in asked) / steps if steps else 0.0, 4),
        "tok_s": round(_rate(asked), 2),
        "itl_p95_s": round(_quantile([gap for a in asked for gap in a.gaps_s], 0.95), 5),
        "ttft_p95_s": round(_quantile([a.ttft_s for a in asked], 0.95), 5),
        "acceptance_end": round(acceptance(last), 4),
        "tok_s_end": round(_rate(last), 2),
    }


def _rate(asked: Sequence[Asked]) -> float:
    # The first piece of an answer comes with its prompt.
    decode_s = sum(a.decode_s for a in asked)
    return sum(len(a.gaps_s) for a in asked) / decode_s if decode_s else 0.0


def acceptance(asked: Sequence[Asked]) -> float:
    """Return the share of tried positions at which the draft was right."""
    tried = sum(a.tried for a in asked)
    return sum(a.accepted for a in asked) / tried if tried else 0.0


def requests_to_recover(asked: Sequence[Asked], phases: Sequence[int]) -> int | None:
    """Return after how many requests of the second phase acceptance is what it is at its end.

    The moving mean over 20 requests against 0.95 of that over the phase's last quarter; None
    without a second phase.
    """
    if len(phases) < 2:
        return None
    second = [a for a in asked if a.phase == phases[1]]
    aim = _SETTLED * acceptance(second[-max(1, len(second) // 4) :])
    for end in range(min(_WINDOW, len(second)), len(second) + 1):
        if acceptance(second[max(0, end - _WINDOW) : end]) >= aim:
            return end
    return len(second)


def forgetting(asked: Sequence[Asked], phases: object) -> float | None:
    """Return what acceptance on the first phase's traffic lost until it came back.

    None where the last phase is another file than the first, or the only one.
    """
    names = list(phases) if isinstance(phases, (list, tuple)) else []
    if len(names) < 2 or names[0] != names[-1]:
        return None
    first = [a for a in asked if a.phase == 0]
    last = [a for a in asked if a.phase == len(names) - 1]
    return round(acceptance(first) - acceptance(last), 4)


def print_report(report: Report) -> None:
    """Print a table, one line for an arm and phase."""
    values = report.to_json()
    print(f"{'arm':8} {'phase':>5} {'acceptance':>10} {'tok/pass':>8} {'tok/s':>7} {'ITL p95':>8}")
    for name in report.arms:
        for number, row in enumerate(values[name], 1):
            print(
                f"{name:8} {number:5} {row['acceptance']:10.3f} {row['emitted_per_step']:8.2f}"
                f" {row['tok_s']:7.1f} {1e3 * row['itl_p95_s']:6.1f}ms"
            )


def draw_plot(report: Report, path: Path) -> None:
    """Draw acceptance over requests, with a mark where the draft's version changes.

    Raises:
        CommandError: the file cannot be written.
    """
    # Nobody else needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("frozen", "online"):
        asked = report.arms[name].asked
        means = [acceptance(asked[max(0, i - _WINDOW) : i + 1]) for i in range(len(asked))]
        axes.plot(range(1, len(asked) + 1), means, label=name)
    asked = report.arms["online"].asked
    for i, (before, now) in enumerate(itertools.pairwise(asked), start=2):
        if now.phase != before.phase:
            axes.axvline(i, color="black", linewidth=0.8)
        elif now.draft_version != before.draft_version:
            axes.axvline(i, color="grey", linewidth=0.3, linestyle=":")
    axes.set(xlabel="request", ylabel=f"acceptance, mean of {_WINDOW} requests", ylim=(0, 1))
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from error


def _outputs(arm: Arm) -> list[tuple[int, tuple[int, ...]]]:
    return sorted((a.phase, a.token_ids) for a in arm.asked)


def _quantile(values: Sequence[float], share: float) -> float:
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
