"""The flags of `paceline up` about scaling, and what of them goes together."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from paceline.cli.errors import CommandError
from paceline.cli.platform_options import MAX_WORKERS, AutoscaleOptions, PlatformOptions

_PANEL = "Autoscaling"

Autoscale = Annotated[
    bool,
    typer.Option(
        "--autoscale",
        help="Let an autoscaler start and end workers, by what Prometheus tells.",
        rich_help_panel=_PANEL,
    ),
]
MinPrefill = Annotated[
    int | None, typer.Option(min=0, help="Fewest prefill workers.", rich_help_panel=_PANEL)
]
MaxPrefill = Annotated[
    int | None, typer.Option(min=0, help="Most prefill workers.", rich_help_panel=_PANEL)
]
MinDecode = Annotated[
    int | None, typer.Option(min=0, help="Fewest decode workers.", rich_help_panel=_PANEL)
]
MaxDecode = Annotated[
    int | None, typer.Option(min=1, help="Most decode workers.", rich_help_panel=_PANEL)
]
SloTtft = Annotated[
    float | None,
    typer.Option(min=0, help="Target for the time to first token.", rich_help_panel=_PANEL),
]
SloItl = Annotated[
    float | None,
    typer.Option(min=0, help="Target for the gap between tokens.", rich_help_panel=_PANEL),
]
Policy = Annotated[
    str | None, typer.Option(help="Name of the scaling policy.", rich_help_panel=_PANEL)
]
ScaleToZero = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="End all workers after so many seconds without requests; the next one wakes them.",
        rich_help_panel=_PANEL,
    ),
]
MaxWorkers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Most workers of one role, whoever asks for them; {MAX_WORKERS} by default.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Prometheus = Annotated[
    bool,
    typer.Option(
        "--prometheus",
        help="Start a Prometheus that scrapes the platform, also without --autoscale.",
        rich_help_panel=_PANEL,
    ),
]
PrometheusUrl = Annotated[
    str | None,
    typer.Option(
        help="Prometheus that scrapes this platform; a private one by default.",
        envvar="PACELINE_PROMETHEUS_URL",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]


def autoscale_options(options: AutoscaleOptions, *, is_wanted: bool) -> AutoscaleOptions | None:
    """Return the options if an autoscaler is wanted.

    Raises:
        CommandError: some are set though none is, or a least number is over its most.
    """
    if not is_wanted:
        if any(value is not None for value in asdict(options).values()):
            raise CommandError("flags of the autoscaler do nothing without --autoscale")
        return None
    for role, least, most in (
        ("prefill", options.min_prefill, options.max_prefill),
        ("decode", options.min_decode, options.max_decode),
    ):
        if least is not None and most is not None and least > most:
            raise CommandError(f"--min-{role} {least} is over --max-{role} {most}")
    return options


def check_counts(options: PlatformOptions) -> None:
    """Check numbers of workers against each other.

    Raises:
        CommandError: there would never be a decode worker, or more than may be.
    """
    scaling, limit = options.autoscale, options.worker_limit
    if options.num_decode == 0 and scaling is None:
        raise CommandError("--decode 0: nobody would start a decode worker without --autoscale")
    counts = {"--prefill": options.num_prefill, "--decode": options.num_decode}
    if scaling is not None:
        counts |= {
            f"--{bound}-{role}": value
            for bound in ("min", "max")
            for role in ("prefill", "decode")
            if (value := getattr(scaling, f"{bound}_{role}")) is not None
        }
    for flag, count in counts.items():
        if count > limit:
            raise CommandError(f"{flag} {count}: --max-workers allows {limit}")
