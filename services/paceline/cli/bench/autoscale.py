"""`paceline bench autoscale`: scaling policies against each other on a recorded load, simulated.

The baselines are as strong as they can be: what hpa and keda-queue aim at, and the size of static,
is chosen on this very load, with hindsight (simulation/tuning.py). The default policy gets no such
thing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli.bench.flags import AsJson
from paceline.cli.errors import CommandError, leave
from paceline.cli.simulation import flags
from paceline.cli.simulation.ceiling import reachable_ratio
from paceline.cli.simulation.load import make_load
from paceline.cli.simulation.plot import check_plot, draw_plot
from paceline.cli.simulation.policies import PolicyOptions, make_policy
from paceline.cli.simulation.profiles import DEFAULT_PROFILE
from paceline.cli.simulation.progress import RunProgress
from paceline.cli.simulation.report import table_head, table_row, to_json, trial_name
from paceline.cli.simulation.results import figures
from paceline.cli.simulation.simulation import Outcome, simulate
from paceline.cli.simulation.traces import read_trace
from paceline.cli.simulation.tuning import GRIDS, Trial, Trials, World, tune_sizes, tune_targets

_ALL = ("default", "hpa", "keda-queue", "static")


def autoscale(
    trace: flags.TraceFile,
    policy: Annotated[
        str, typer.Option(help="default, hpa, keda-queue, static, or all of them.")
    ] = "default",
    slo_ttft: Annotated[float, typer.Option(min=0.001, help="TTFT target in seconds.")] = 2.0,
    slo_itl: Annotated[float, typer.Option(min=0.001, help="ITL target in seconds.")] = 0.05,
    slo_goal: flags.Goal = 0.99,
    replica: Annotated[
        str,
        typer.Option(
            help="8b-a100, 8b-h100, 8b-l4, demo-cpu, a JSON file, or a checkpoint measured here."
        ),
    ] = DEFAULT_PROFILE,
    start_up_s: Annotated[
        float, typer.Option(min=0.0, help="Seconds until a replica takes requests.")
    ] = 60.0,
    load: Annotated[float, typer.Option(min=0.001, help="Multiple of the trace's rate.")] = 1.0,
    limit_s: flags.Limit = None,
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
    acceptance: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of draft tokens accepted; 0: no drafts.")
    ] = 0.0,
    training: Annotated[str, typer.Option(help="on: acceptance rises as drafts learn.")] = "off",
    draft_nodes: flags.Nodes = 4,
    emitted_per_step: flags.Emitted = None,
    scrape_s: flags.Scrape = 5.0,
    window_s: flags.Window = 30.0,
    lag: flags.Lag = 1,
    blackout: flags.Blackout = None,
    deadline_s: flags.Deadline = 300.0,
    seed: flags.Seed = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG of load, replicas and TTFT.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare scaling policies by SLO attainment and replica-seconds on a recorded load."""
    given = flags.Given(
        trace=trace.name,
        replica=replica,
        policy=policy,
        slo_ttft=slo_ttft,
        slo_itl=slo_itl,
        start_up_s=start_up_s,
        acceptance=acceptance,
        training=training,
        load=load,
        limit_s=limit_s,
        goal=slo_goal,
        prefill=prefill,
        decode=decode,
        target=target,
        min_prefill=min_prefill,
        min_decode=min_decode,
        max_prefill=max_prefill,
        max_decode=max_decode,
        idle_s=idle_s,
        period_s=period_s,
        drain_grace_s=drain_grace_s,
        start_up_spread=start_up_spread,
        draft_nodes=draft_nodes,
        emitted_per_step=emitted_per_step,
        scrape_s=scrape_s,
        window_s=window_s,
        lag=lag,
        blackout=blackout,
        deadline_s=deadline_s,
        seed=seed,
    )
    try:
        check_plot(plot)
        if policy not in (*_ALL, "all"):
            raise CommandError(f"--policy {policy}: expected {', '.join(_ALL)} or all")
        _compare(given, trace, plot, is_quiet=as_json)
    except CommandError as error:
        leave("bench autoscale", error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _compare(given: flags.Given, path: Path, plot: Path | None, *, is_quiet: bool) -> None:
    options = given.simulation_options()
    arrivals = make_load(read_trace(path), given.load_options())
    if not arrivals:
        raise CommandError("--load, --limit-s: no request of the trace is left")
    world = World(arrivals, options, make_policy)
    emitted = options.drafting.emitted_per_step(0.0)
    reachable = reachable_ratio(arrivals, options.profile, given.slo_ttft, given.slo_itl, emitted)
    goal = given.goal * reachable
    _say(f"goal: {goal:.2%}, {given.goal:.2%} of the {reachable:.2%} reachable without any queue")
    _say(table_head("trial"))
    rows: list[dict[str, Any]] = []
    runs: list[tuple[str, Outcome]] = []
    for name in _ALL if given.policy == "all" else (given.policy,):
        asked = replace(given.policy_options(), name=name)
        policy = _tuned(world, asked, goal)
        trial, outcome = _run(world, policy, is_quiet=is_quiet)
        runs.append((f"{trial_name(trial)} on {given.trace}", outcome))
        rows.append(to_json(given, policy, trial.figures, reachable))
    if plot is not None:
        draw_plot(runs, plot)
    if given.policy == "all" and not is_quiet:
        _print_ratios(rows, print)
    print(json.dumps({"policies": rows} if given.policy == "all" else rows[0]), flush=True)


def _tuned(world: World, policy: PolicyOptions, goal: float) -> PolicyOptions:
    """Return the policy with its parameters chosen, where it has some that are not given."""
    if policy.name in GRIDS and not policy.targets:
        with Trials(world, _report) as trials:
            return tune_targets(trials, policy, goal).policy
    if policy.name == "static" and not policy.sizes:
        with Trials(world, _report) as trials:
            return tune_sizes(trials, policy, goal).policy
    return policy if policy.name == "static" else replace(policy, sizes={})


def _run(world: World, policy: PolicyOptions, *, is_quiet: bool) -> tuple[Trial, Outcome]:
    options = world.options
    if policy.name == "static":
        options = replace(options, initial=policy.sizes)
    with RunProgress(policy.name, is_quiet=is_quiet) as progress:
        outcome = simulate(world.load, world.make(policy), options, progress.note)
    trial = Trial(policy, figures(outcome))
    _say(f"{table_row(trial_name(trial), trial.figures)}  <- {policy.name}")
    return trial, outcome


def _report(trial: Trial) -> None:
    _say(table_row(trial_name(trial), trial.figures))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_ratios(rows: list[dict[str, Any]], say: Callable[[str], None]) -> None:
    own = next(row for row in rows if row["policy"] == "default")
    say(f"{'policy':12}{'attained':>10}{'replica-s':>11}{'to default':>12}")
    for row in rows:
        ratio = row["replica_seconds"] / own["replica_seconds"]
        say(
            f"{row['policy']:12}{row['slo_attainment']:>10.2%}{row['replica_seconds']:>11.0f}"
            f"{ratio:>12.2f}"
        )
