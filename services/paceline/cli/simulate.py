"""`paceline simulate`: what a fleet would have made of a recorded load.

One run by default. A list by commas for one of the switches that allow it makes one run each and
a table: what if the SLO were tighter, replicas started faster, drafts learned?
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli.console import say
from paceline.cli.errors import CommandError, leave
from paceline.cli.simulation import flags
from paceline.cli.simulation.ceiling import reachable_ratio
from paceline.cli.simulation.load import make_load
from paceline.cli.simulation.plot import check_plot, draw_plot
from paceline.cli.simulation.policies import make_policy
from paceline.cli.simulation.profiles import DEFAULT_PROFILE
from paceline.cli.simulation.progress import RunProgress
from paceline.cli.simulation.report import (
    print_decisions,
    print_run,
    table_head,
    table_row,
    to_json,
)
from paceline.cli.simulation.results import Figures, figures
from paceline.cli.simulation.simulation import Outcome
from paceline.cli.simulation.simulation import simulate as run_simulation
from paceline.cli.simulation.traces import Trace, read_trace

_LISTED = "Lists by commas"


def simulate(
    trace: flags.TraceFile,
    policy: Annotated[
        str,
        typer.Option(help="default, hpa, keda-queue or static.", rich_help_panel=_LISTED),
    ] = "default",
    slo_ttft: Annotated[
        str, typer.Option(help="TTFT target in seconds.", rich_help_panel=_LISTED)
    ] = "2",
    slo_itl: Annotated[
        str, typer.Option(help="ITL target in seconds.", rich_help_panel=_LISTED)
    ] = "0.05",
    start_up_s: Annotated[
        str,
        typer.Option(help="Seconds until a replica takes requests.", rich_help_panel=_LISTED),
    ] = "60",
    acceptance: Annotated[
        str,
        typer.Option(help="Share of draft tokens accepted; 0: no drafts.", rich_help_panel=_LISTED),
    ] = "0",
    training: Annotated[
        str,
        typer.Option(help="on: acceptance rises as drafts learn.", rich_help_panel=_LISTED),
    ] = "off",
    load: Annotated[
        str, typer.Option(help="Multiple of the trace's rate.", rich_help_panel=_LISTED)
    ] = "1",
    replica: Annotated[
        str,
        typer.Option(
            help="8b-a100, 8b-h100, 8b-l4, demo-cpu, a JSON file, or a checkpoint measured here.",
            rich_help_panel=_LISTED,
        ),
    ] = DEFAULT_PROFILE,
    slo_goal: flags.Goal = 0.99,
    prefill: flags.Prefill = None,
    decode: flags.Decode = None,
    target: flags.Targets = None,
    min_prefill: flags.MinPrefill = 1,
    min_decode: flags.MinDecode = 1,
    max_prefill: flags.MaxPrefill = 32,
    max_decode: flags.MaxDecode = 32,
    idle_s: flags.Idle = None,
    period_s: flags.Period = 5.0,
    start_up_spread: flags.Spread = 0.1,
    drain_grace_s: flags.DrainGrace = 25.0,
    draft_nodes: flags.Nodes = 4,
    emitted_per_step: flags.Emitted = None,
    scrape_s: flags.Scrape = 5.0,
    window_s: flags.Window = 30.0,
    lag: flags.Lag = 1,
    blackout: flags.Blackout = None,
    deadline_s: flags.Deadline = 300.0,
    limit_s: flags.Limit = None,
    seed: flags.Seed = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print every change of mind with its reason.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG of the runs.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print nothing but the JSON line.")
    ] = False,
) -> None:
    """Replay a recorded load against a simulated fleet and the real scaling policy."""
    try:
        check_plot(plot)
        switch, variants = _variants(
            {
                "policy": policy,
                "slo_ttft": slo_ttft,
                "slo_itl": slo_itl,
                "start_up_s": start_up_s,
                "acceptance": acceptance,
                "training": training,
                "load": load,
                "replica": replica,
            }
        )
        common: dict[str, Any] = {
            "trace": trace.name,
            "limit_s": limit_s,
            "goal": slo_goal,
            "prefill": prefill,
            "decode": decode,
            "target": target,
            "min_prefill": min_prefill,
            "min_decode": min_decode,
            "max_prefill": max_prefill,
            "max_decode": max_decode,
            "idle_s": idle_s,
            "period_s": period_s,
            "drain_grace_s": drain_grace_s,
            "start_up_spread": start_up_spread,
            "draft_nodes": draft_nodes,
            "emitted_per_step": emitted_per_step,
            "scrape_s": scrape_s,
            "window_s": window_s,
            "lag": lag,
            "blackout": blackout,
            "deadline_s": deadline_s,
            "seed": seed,
        }
        recorded = read_trace(trace)
        runs = [
            _run(recorded, flags.Given(**variant, **common), name, is_quiet=as_json)
            for name, variant in variants.items()
        ]
        if not as_json:
            _print(switch, runs, explain=explain)
        if plot is not None:
            draw_plot([(run.name, run.outcome) for run in runs], plot)
        if as_json:
            print(json.dumps(_to_json(switch, runs)), flush=True)
    except CommandError as error:
        leave("simulate", error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@dataclass(frozen=True, slots=True)
class _Run:
    name: str
    given: flags.Given
    outcome: Outcome
    figures: Figures
    reachable: float


def _run(trace: Trace, given: flags.Given, name: str, *, is_quiet: bool) -> _Run:
    arrivals = make_load(trace, given.load_options())
    if not arrivals:
        raise CommandError("--load, --limit-s: no request of the trace is left")
    options, policy = given.simulation_options(), given.policy_options()
    if policy.name == "static":
        if not policy.sizes:
            raise CommandError("--policy static: give its size, --prefill and --decode")
        options = replace(options, initial=policy.sizes)
    with RunProgress(name, is_quiet=is_quiet) as progress:
        outcome = run_simulation(arrivals, make_policy(policy), options, progress.note)
    emitted = options.drafting.emitted_per_step(0.0)
    reachable = reachable_ratio(arrivals, options.profile, given.slo_ttft, given.slo_itl, emitted)
    return _Run(name, given, outcome, figures(outcome), reachable)


def _variants(listed: dict[str, str]) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return the switch with several values, if there is one, and the values of each run.

    Raises:
        CommandError: several have several, or one is not what it should be.
    """
    values = {name: [part.strip() for part in text.split(",")] for name, text in listed.items()}
    several = [name for name, parts in values.items() if len(parts) > 1]
    if len(several) > 1:
        raise CommandError(f"lists for {_flag(several[0])} and {_flag(several[1])}: one at a time")
    switch = several[0] if several else ""
    single = {name: _value(name, parts[0]) for name, parts in values.items()}
    if not switch:
        return "", {listed["policy"]: single}
    return switch, {
        f"{_flag(switch)} {part}": {**single, switch: _value(switch, part)}
        for part in values[switch]
    }


def _value(name: str, text: str) -> float | str:
    if name in ("policy", "training", "replica"):
        return text
    try:
        return float(text)
    except ValueError as error:
        raise CommandError(f"{_flag(name)} {text!r}: expected a number") from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _print(switch: str, runs: Sequence[_Run], *, explain: bool) -> None:
    if switch:
        say(table_head("what if"))
        for run in runs:
            say(table_row(run.name, run.figures))
        say(f"reachable without any queue: {', '.join(f'{run.reachable:.2%}' for run in runs)}")
    for run in runs:
        if not switch:
            print_run(run.outcome, run.figures, run.reachable, say)
        if explain:
            if switch:
                say(run.name)
            print_decisions(run.outcome.decisions, say)


def _to_json(switch: str, runs: Sequence[_Run]) -> dict[str, Any]:
    rows = [
        to_json(run.given, run.given.policy_options(), run.figures, run.reachable) for run in runs
    ]
    return {"switch": switch, "runs": rows} if switch else rows[0]
