"""Prints runs for people: one run in full, several as a table, decisions with their reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paceline.autoscaler.values import POOLS, Decision
from paceline.cli.simulation.flags import Given
from paceline.cli.simulation.fleet import Change
from paceline.cli.simulation.policies import PolicyOptions
from paceline.cli.simulation.results import Figures
from paceline.cli.simulation.simulation import Outcome
from paceline.cli.simulation.tuning import Trial
from paceline.domain.member import Role

Say = Callable[[str], None]

_NUM_BARS = 60
_BARS = " ▁▂▃▄▅▆▇█"

_COLUMNS = (
    ("attained", 9),
    ("TTFT p50", 9),
    ("p99", 8),
    ("ITL p99", 9),
    ("replica-s", 10),
    ("prefill", 8),
    ("decode", 7),
    ("most", 5),
    ("changes", 8),
    ("failed", 7),
)


def print_run(outcome: Outcome, figures: Figures, reachable: float, say: Say) -> None:
    """Print one run in full."""
    options = outcome.options
    say(
        f"{figures.requests} requests in {figures.duration_s:.0f} s on {options.profile.name}, "
        f"{figures.failed} failed{_reasons(figures.failures)}"
    )
    say(
        f"SLO: TTFT <= {options.slo_ttft_s:g} s and ITL <= {options.slo_itl_s:g} s: "
        f"{figures.slo_attainment:.2%} attained (TTFT {figures.ttft_attainment:.2%}, "
        f"ITL {figures.itl_attainment:.2%}; reachable without any queue {reachable:.2%})"
    )
    say(f"{'':10}{'p50':>10}{'p95':>10}{'p99':>10}")
    say(_quantiles("TTFT", figures.ttft_p50_s, figures.ttft_p95_s, figures.ttft_p99_s))
    say(_quantiles("ITL", figures.itl_p50_s, figures.itl_p95_s, figures.itl_p99_s))
    say(_quantiles("E2E", figures.e2e_p50_s, None, figures.e2e_p99_s))
    say(
        f"replica-seconds {figures.replica_seconds:.0f}: prefill {figures.mean_prefill:.2f} and "
        f"decode {figures.mean_decode:.2f} on average, {figures.max_replicas} at most, "
        f"{figures.scale_events} changes of size, {figures.migrations} streams moved"
    )
    say(
        f"prompts: {figures.decode_only_ratio:.0%} computed by decode workers, "
        f"{figures.cached_ratio:.0%} of tokens from the store"
    )
    for role in POOLS:
        bars, most = _over_time(outcome.changes, role, outcome.end_s)
        say(f"{role.value:8} 0..{most:<3} {bars}")


def print_decisions(decisions: Sequence[Decision], say: Say) -> None:
    """Print every decision that differs from the one before it, with its reason."""
    last: Decision | None = None
    for decision in decisions:
        if last is None or (decision.replicas, decision.kind) != (last.replicas, last.kind):
            sizes = ", ".join(f"{role.value} {n}" for role, n in decision.replicas.items())
            say(f"{decision.at_s:8.1f} s  {decision.kind:7}  {sizes}  {decision.reason}")
        last = decision


def table_head(name: str) -> str:
    """Return the head of a table of runs."""
    return f"{name:22}" + "".join(f"{title:>{width}}" for title, width in _COLUMNS)


def table_row(name: str, figures: Figures) -> str:
    """Return a run's line of it."""
    values = (
        f"{figures.slo_attainment:.2%}",
        _seconds(figures.ttft_p50_s),
        _seconds(figures.ttft_p99_s),
        _seconds(figures.itl_p99_s),
        f"{figures.replica_seconds:.0f}",
        f"{figures.mean_prefill:.2f}",
        f"{figures.mean_decode:.2f}",
        str(figures.max_replicas),
        str(figures.scale_events),
        str(figures.failed),
    )
    widths = (width for _, width in _COLUMNS)
    return f"{name:22}" + "".join(f"{v:>{w}}" for v, w in zip(values, widths, strict=True))


def trial_name(trial: Trial) -> str:
    """Return what tells a trial from others of its policy."""
    policy = trial.policy
    if policy.sizes:
        return f"{policy.name} {policy.sizes[Role.PREFILL]}+{policy.sizes[Role.DECODE]}"
    if policy.targets:
        aims = ", ".join(f"{policy.targets[role]:g}" for role in POOLS)
        return f"{policy.name} {aims}"
    return policy.name


def to_json(
    given: Given, policy: PolicyOptions, figures: Figures, reachable: float
) -> dict[str, Any]:
    """Return a run as JSON: the policy, what it came to, and in which world."""
    return {
        "policy": policy.name,
        **figures.to_json(),
        "targets": {role.value: target for role, target in policy.targets.items()},
        "sizes": {role.value: size for role, size in policy.sizes.items()},
        "trace": given.trace,
        "replica": given.replica,
        "slo_ttft_s": given.slo_ttft,
        "slo_itl_s": given.slo_itl,
        "slo_goal": given.goal,
        "reachable_ratio": round(reachable, 5),
        "start_up_s": given.start_up_s,
        "load": given.load,
        "acceptance": given.acceptance,
        "training": given.training,
        "period_s": given.period_s,
        "seed": given.seed,
    }


def _quantiles(name: str, *values: float | None) -> str:
    return f"{name:10}" + "".join(f"{_seconds(value):>10}" for value in values)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1e3 * value:.1f}ms" if value < 0.1 else f"{value:.2f}s"


def _reasons(failures: Mapping[str, int]) -> str:
    if not failures:
        return ""
    return " (" + ", ".join(f"{n} {reason}" for reason, n in sorted(failures.items())) + ")"


def _over_time(changes: Sequence[Change], role: Role, end_s: float) -> tuple[str, int]:
    """Return a bar for each sixtieth of the time, of the most ready replicas in it."""
    own = [change for change in changes if change.role is role]
    most = max((change.ready for change in own), default=0)
    bars, place, ready = "", 0, 0
    for number in range(_NUM_BARS):
        until_s = end_s * (number + 1) / _NUM_BARS
        peak = ready
        while place < len(own) and own[place].at_s <= until_s:
            ready = own[place].ready
            peak = max(peak, ready)
            place += 1
        bars += _BARS[-(-peak * (len(_BARS) - 1) // most) if most else 0]
    return bars, most
