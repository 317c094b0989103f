"""`paceline autoscaler explain`: why pools have the sizes they have.

Decisions come from a running autoscaler, found through the gateway, or from a journal that a
policy decides about once more.
"""

from __future__ import annotations

import json
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.autoscaler.guard import checked
from paceline.autoscaler.journal import Entry, entry_to_json
from paceline.autoscaler.policies import create_policy
from paceline.autoscaler.settings import AutoscalerSettings
from paceline.autoscaler.sources.replay import read_observations
from paceline.cli.errors import CommandError, leave
from paceline.cli.http_get import http_get
from paceline.cli.status import DEFAULT_ENDPOINT, fetch_status

TIMEOUT_S = 5.0
FOLLOW_S = 1.0

autoscaler = typer.Typer(
    name="autoscaler", help="What sizes the pools of workers.", no_args_is_help=True
)


@autoscaler.callback()
def _group() -> None:
    """Make `explain` a command of its own although it is the only one."""


@autoscaler.command()
def explain(
    endpoint: Annotated[
        str, typer.Option(help="host:port of the gateway's HTTP port.")
    ] = DEFAULT_ENDPOINT,
    address: Annotated[
        str | None,
        typer.Option(
            "--autoscaler",
            help="host:port of the autoscaler's HTTP port; the gateway knows it, too.",
            show_default=False,
        ),
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="Decisions to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per decision.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new ones until Ctrl-C.")
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Journal of an autoscaler to decide about once more.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Policy that decides about --replay; its settings: PACELINE_* variables.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show decisions, one line each: when, what, the sizes, and the numbers that decided."""
    try:
        if policy is not None and replay is None:
            raise CommandError("--policy goes with --replay")
        if replay is not None and (follow or address is not None):
            raise CommandError(
                "--replay asks nobody: it goes with neither --follow nor --autoscaler"
            )
        if replay is not None:
            shown = list(decide_again(replay, policy))[-last:]
            _show(shown, as_json)
        else:
            _explain(address or find_autoscaler(endpoint), last, as_json, follow)
    except CommandError as error:
        leave("autoscaler explain", error)
    except KeyboardInterrupt:
        return


def find_autoscaler(endpoint: str) -> str:
    """Return host:port of the HTTP port of the fleet's autoscaler.

    Raises:
        CommandError: no gateway answers, or it knows of none.
    """
    for member in fetch_status(endpoint).get("members") or []:
        if member.get("role") == "autoscaler" and member.get("metrics_address"):
            return str(member["metrics_address"])
    raise CommandError(f"no autoscaler is in the fleet of the gateway at {endpoint}")


def fetch_decisions(address: str, last: int) -> list[dict[str, Any]]:
    """Return the last decisions of an autoscaler, oldest first.

    Raises:
        CommandError: nobody answers there, or not an autoscaler.
    """
    url = f"http://{address}/decisions?last={last}"
    try:
        data = json.loads(http_get(url, TIMEOUT_S))
        decisions: list[dict[str, Any]] = data["decisions"]
        return decisions
    except urllib.error.HTTPError as error:
        error.close()
        raise CommandError(f"{url} answers {error.code}: is it an autoscaler's port?") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(f"{url} does not answer with decisions") from error
    except OSError as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise CommandError(f"no autoscaler answers at {url}: {cause}") from error


def decide_again(path: Path, policy: str | None) -> Iterator[dict[str, Any]]:
    """Yield what a policy decides about recorded observations.

    Raises:
        CommandError: the file is no journal, or there is no such policy.
    """
    settings = AutoscalerSettings.load([])
    try:
        deciding = create_policy(policy or settings.policy, settings.rules())
        for number, observation in enumerate(read_observations(path), 1):
            decision = checked(observation, deciding.decide(observation))
            yield entry_to_json(Entry(number, observation, decision))
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error


def line_of(entry: dict[str, Any]) -> str:
    """Return one decision as a line."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["at_s"]))
    pools = "  ".join(_pool_text(name, pool) for name, pool in entry["pools"].items())
    parked = f"  parked {entry['parked']}" if entry.get("parked") else ""
    effects = "".join(f"  [{_effect_text(effect)}]" for effect in entry.get("effects") or [])
    return f"{when}  {entry['kind']:<7}  {pools}{parked}  {entry['reason']}{effects}"


def _pool_text(name: str, pool: dict[str, int]) -> str:
    desired, requested = pool["desired"], pool["requested"]
    size = f"{requested}" if desired == requested else f"{requested} -> {desired}"
    rest = ", ".join(f"{pool[key]} {key}" for key in ("ready", "starting", "draining") if pool[key])
    return f"{name} {size} ({rest or 'none ready'})"


def _effect_text(effect: dict[str, Any]) -> str:
    reason = f": {effect['reason']}" if effect.get("reason") else ""
    return f"{effect['role']} {effect['outcome']}{reason}"


def _explain(address: str, last: int, as_json: bool, follow: bool) -> None:
    shown = fetch_decisions(address, last)
    _show(shown, as_json)
    if not shown and not follow:
        raise CommandError(f"the autoscaler at {address} has not decided anything yet")
    seen = shown[-1]["number"] if shown else 0
    while follow:
        time.sleep(FOLLOW_S)
        # A restarted autoscaler counts from 1 again.
        fresh = fetch_decisions(address, last)
        if fresh and fresh[-1]["number"] < seen:
            seen = 0
        _show([entry for entry in fresh if entry["number"] > seen], as_json)
        seen = fresh[-1]["number"] if fresh else seen


def _show(entries: list[dict[str, Any]], as_json: bool) -> None:
    for entry in entries:
        print(json.dumps(entry) if as_json else line_of(entry), flush=True)
