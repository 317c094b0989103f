"""`paceline status`: what the fleet does, as the gateway's status page tells it."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from paceline.cli.errors import CommandError, leave
from paceline.cli.http_get import http_get

DEFAULT_ENDPOINT = "127.0.0.1:8080"
PERIOD_S = 1.0
TIMEOUT_S = 5.0


def status(
    endpoint: Annotated[
        str, typer.Option(help="host:port of the gateway's HTTP port.")
    ] = DEFAULT_ENDPOINT,
    once: Annotated[bool, typer.Option("--once", help="Print once instead of live.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the gateway's JSON once.")] = False,
) -> None:
    """Show the fleet as a live table; Ctrl-C ends it."""
    console = Console()
    try:
        first = fetch_status(endpoint)
        if as_json:
            print(json.dumps(first))
        elif once or not sys.stdout.isatty():
            console.print(render(first))
        else:
            _follow(console, endpoint, first)
    except CommandError as error:
        leave("status", error)
    except KeyboardInterrupt:
        return


def _follow(console: Console, endpoint: str, first: dict[str, Any]) -> None:
    """Refresh until interrupted. A gateway that is away for a while may be restarting."""
    shown, trouble = first, ""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            parts: list[RenderableType] = [render(shown)]
            if trouble:
                parts.append(Text(trouble, style="bold red"))
            live.update(Group(*parts), refresh=True)
            time.sleep(PERIOD_S)
            try:
                shown, trouble = fetch_status(endpoint), ""
            except CommandError as error:
                trouble = error.message


def fetch_status(endpoint: str) -> dict[str, Any]:
    """Return the gateway's status.

    Raises:
        CommandError: nobody answers there, or not a gateway.
    """
    url = f"http://{endpoint}/status"
    try:
        data = json.loads(http_get(url, TIMEOUT_S))
    except urllib.error.HTTPError as error:
        raise CommandError(f"{url} answers {error.code}: is it the gateway's HTTP port?") from error
    except (OSError, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise CommandError(f"no gateway answers at {url}: {cause}") from error
    if not isinstance(data, dict):
        raise CommandError(f"{url} does not answer with a status")
    return data


def render(data: dict[str, Any]) -> RenderableType:
    """Return the status as tables."""
    requests = data.get("requests") or {}
    model = (data.get("model") or {}).get("name", "none")
    redis = "up" if data.get("has_redis") else "down"
    head = (
        f"paceline {data.get('version', '?')}   model {model}   redis {redis}\n"
        f"requests: {requests.get('running', 0)} running ({requests.get('parked', 0)} parked), "
        f"{requests.get('finished', 0)} finished, {requests.get('failed', 0)} failed"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("member", "address", "pid", "node", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("run", "wait", "prefill", "KV", "context"):
        table.add_column(name, justify="right", no_wrap=True)
    members = data.get("members") or []
    for member in members:
        table.add_row(*_row(member))
    units = "run, wait: sequences   prefill, context: tokens   KV: share of blocks in use"
    accepted = [text for text in map(_accepted, members) if text]
    drafts = [Text(f"drafts accepted: {', '.join(accepted)}")] if accepted else []
    return Group(Text(head), table, *drafts, Text(units, style="dim"))


def _row(member: dict[str, Any]) -> list[str]:
    state = "ready"
    if member.get("is_draining"):
        state = "draining"
    elif member.get("is_suspect"):
        state = "suspect"
    cells = [str(member.get(key, "")) for key in ("id", "address", "pid", "node_id")]
    if member.get("role") not in ("prefill", "decode"):
        return [*cells, state, *[""] * 5]
    load = member.get("load") or {}
    total = load.get("total_blocks", 0)
    used_ratio = 1 - load.get("free_blocks", 0) / total if total else 0.0
    return [
        *cells,
        state,
        str(load.get("num_running", 0)),
        str(load.get("num_waiting", 0)),
        str(load.get("pending_prefill_tokens", 0)),
        f"{used_ratio:.0%}",
        str(load.get("context_tokens", 0)),
    ]


def _accepted(member: dict[str, Any]) -> str:
    """Return the share of a worker's drafts that were accepted; empty without drafts."""
    load = member.get("load") or {}
    drafted = load.get("drafted_tokens", 0)
    return f"{member.get('id')} {load.get('accepted_tokens', 0) / drafted:.0%}" if drafted else ""
