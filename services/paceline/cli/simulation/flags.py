"""Flags that `simulate` and `bench autoscale` share, and the world that they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.errors import CommandError
from paceline.cli.simulation.drafting import (
    MOST_ACCEPTANCE,
    TRAINED_GAIN,
    Drafting,
    acceptance_for,
)
from paceline.cli.simulation.fleet import FleetOptions
from paceline.cli.simulation.load import LoadOptions
from paceline.cli.simulation.observing import ScrapeOptions
from paceline.cli.simulation.policies import PolicyOptions
from paceline.cli.simulation.profiles import find_profile
from paceline.cli.simulation.simulation import SimulationOptions
from paceline.domain.member import Role

_WORLD = "World"
_SCALING = "Scaling"

TraceFile = Annotated[
    Path,
    typer.Option("--trace", help="Azure CSV, Mooncake JSONL or our JSONL; told by content."),
]
Limit = Annotated[
    float | None,
    typer.Option(min=1.0, help="Only requests of the first seconds.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Goal = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Share of reachable requests that is to attain the SLO."),
]
Prefill = Annotated[
    int | None,
    typer.Option(min=0, help="Size for static.", show_default=False, rich_help_panel=_SCALING),
]
Decode = Annotated[
    int | None,
    typer.Option(min=1, help="Size for static.", show_default=False, rich_help_panel=_SCALING),
]
Targets = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="PREFILL,DECODE",
        help="What hpa and keda-queue aim at; one number is for both pools.",
        show_default=False,
        rich_help_panel=_SCALING,
    ),
]
MinPrefill = Annotated[int, typer.Option(min=0, rich_help_panel=_SCALING, help="Replicas.")]
MinDecode = Annotated[int, typer.Option(min=0, rich_help_panel=_SCALING, help="Replicas.")]
MaxPrefill = Annotated[int, typer.Option(min=0, rich_help_panel=_SCALING, help="Replicas.")]
MaxDecode = Annotated[int, typer.Option(min=1, rich_help_panel=_SCALING, help="Replicas.")]
Idle = Annotated[
    float | None,
    typer.Option(
        min=1.0,
        help="Seconds without requests after which pools go to zero.",
        show_default=False,
        rich_help_panel=_SCALING,
    ),
]
Period = Annotated[
    float, typer.Option(min=0.1, help="Seconds between decisions.", rich_help_panel=_SCALING)
]
DrainGrace = Annotated[
    float,
    typer.Option(
        min=0.0, help="Seconds that a leaving worker's streams get.", rich_help_panel=_WORLD
    ),
]
Spread = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Start-up times differ by this share.", rich_help_panel=_WORLD
    ),
]
Nodes = Annotated[
    int,
    typer.Option(min=0, max=64, help="Draft tokens per step.", rich_help_panel=_WORLD),
]
Emitted = Annotated[
    float | None,
    typer.Option(
        min=1.0,
        help="Tokens per step, instead of --acceptance.",
        show_default=False,
        rich_help_panel=_WORLD,
    ),
]
Scrape = Annotated[
    float, typer.Option(min=0.1, help="Seconds between scrapes.", rich_help_panel=_WORLD)
]
Window = Annotated[
    float, typer.Option(min=1.0, help="Seconds that rates look back.", rich_help_panel=_WORLD)
]
Lag = Annotated[
    int, typer.Option(min=0, help="Scrapes by which metrics are late.", rich_help_panel=_WORLD)
]
Blackout = Annotated[
    list[str] | None,
    typer.Option(
        metavar="START:DURATION",
        help="Seconds in which metrics cannot be had; may be given again.",
        show_default=False,
        rich_help_panel=_WORLD,
    ),
]
Deadline = Annotated[
    float,
    typer.Option(min=1.0, help="Seconds after which a request failed.", rich_help_panel=_WORLD),
]


@dataclass(frozen=True, slots=True)
class Given:
    """What the flags say of one run."""

    trace: str
    """The file's name."""
    replica: str
    policy: str
    slo_ttft: float
    slo_itl: float
    start_up_s: float
    acceptance: float
    training: str
    load: float
    limit_s: float | None
    goal: float
    prefill: int | None
    decode: int | None
    target: str | None
    min_prefill: int
    min_decode: int
    max_prefill: int
    max_decode: int
    idle_s: float | None
    period_s: float
    drain_grace_s: float
    start_up_spread: float
    draft_nodes: int
    emitted_per_step: float | None
    scrape_s: float
    window_s: float
    lag: int
    blackout: list[str] | None
    deadline_s: float
    seed: int

    def load_options(self) -> LoadOptions:
        """Return what is taken of the trace.

        Raises:
            CommandError: nothing is.
        """
        if not 0.0 < self.load < 1e4:
            raise CommandError(f"--load {self.load:g}: expected above 0, below 10,000")
        return LoadOptions(self.load, self.limit_s, self.seed)

    def policy_options(self) -> PolicyOptions:
        """Return what the policy is told.

        Raises:
            CommandError: bounds contradict each other.
        """
        least = {Role.PREFILL: self.min_prefill, Role.DECODE: self.min_decode}
        most = {Role.PREFILL: self.max_prefill, Role.DECODE: self.max_decode}
        for role in least:
            if least[role] > most[role]:
                name = role.value
                raise CommandError(f"--min-{name} {least[role]} is above --max-{name} {most[role]}")
        sizes = {}
        if self.prefill is not None and self.decode is not None:
            sizes = {Role.PREFILL: self.prefill, Role.DECODE: self.decode}
        return PolicyOptions(
            name=self.policy,
            slo_ttft_s=self.slo_ttft,
            slo_itl_s=self.slo_itl,
            goal_ratio=self.goal,
            start_up_s=self.start_up_s,
            period_s=self.period_s,
            least=least,
            most=most,
            idle_s=self.idle_s,
            targets=self._targets(),
            sizes=sizes,
        )

    def _targets(self) -> dict[Role, float]:
        if self.target is None:
            return {}
        parts = self.target.split(",")
        try:
            values = [float(part) for part in parts]
        except ValueError:
            values = []
        if len(values) not in (1, 2) or not all(0.0 < value < 1e6 for value in values):
            raise CommandError(f"--target {self.target}: expected one number above 0, or two")
        return {Role.PREFILL: values[0], Role.DECODE: values[-1]}

    def simulation_options(self) -> SimulationOptions:
        """Return the world; a fixed fleet is there from the start.

        Raises:
            CommandError: a flag's value makes no sense.
        """
        for name in ("slo_ttft", "slo_itl", "start_up_s"):
            value = getattr(self, name)
            if not 0.0 <= value < 1e6:
                raise CommandError(f"--{name.replace('_', '-')} {value:g}: expected seconds")
        return SimulationOptions(
            profile=find_profile(self.replica),
            slo_ttft_s=self.slo_ttft,
            slo_itl_s=self.slo_itl,
            initial={Role.PREFILL: self.min_prefill, Role.DECODE: self.min_decode},
            fleet=FleetOptions(
                self.start_up_s, self.start_up_spread, self.drain_grace_s, self.seed
            ),
            scrape=ScrapeOptions(
                self.scrape_s,
                self.window_s,
                self.lag,
                tuple(_blackout(text) for text in self.blackout or ()),
            ),
            drafting=self._drafting(),
            period_s=self.period_s,
            deadline_s=self.deadline_s,
            seed=self.seed,
        )

    def _drafting(self) -> Drafting:
        nodes, acceptance = self.draft_nodes, self.acceptance
        if self.training not in ("on", "off"):
            raise CommandError(f"--training {self.training}: expected on or off")
        if not 0.0 <= acceptance <= 1.0:
            raise CommandError(f"--acceptance {acceptance}: expected 0 to 1")
        if self.emitted_per_step is not None:
            try:
                acceptance = acceptance_for(self.emitted_per_step, nodes)
            except ValueError as error:
                raise CommandError(f"--emitted-per-step with --draft-nodes: {error}") from error
        if not acceptance:
            return Drafting()
        reached = max(acceptance, min(acceptance + TRAINED_GAIN, MOST_ACCEPTANCE))
        return Drafting(acceptance, nodes, reached if self.training == "on" else None)


def _blackout(text: str) -> tuple[float, float]:
    start, colon, length = text.partition(":")
    try:
        if colon:
            return float(start), float(length)
    except ValueError:
        pass
    raise CommandError(f"--blackout {text}: expected START:DURATION in seconds")
