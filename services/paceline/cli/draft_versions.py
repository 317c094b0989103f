"""`paceline draft list|show|rollback|pin|unpin|offer|remove`: versions that a trainer looks after.

The trainer is found through the gateway's status page, or named. cli/draft.py has the group.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from paceline.cli.client import describe_error
from paceline.cli.draft_client import DraftClient, open_draft_client
from paceline.cli.errors import CommandError, leave
from paceline.cli.status import DEFAULT_ENDPOINT as DEFAULT_GATEWAY
from paceline.cli.status import fetch_status
from paceline.domain.draft_files import CONFIG, WEIGHTS_SUFFIX, is_draft_file
from paceline.domain.draft_records import DraftRecord, DraftStage
from paceline.domain.errors import PacelineError
from paceline.domain.member import Role

T = TypeVar("T")

_WIDTH = 100
"""Of tables where the output is no terminal."""

_Endpoint = Annotated[
    str | None,
    typer.Option(help="host:port of the trainer; found by the gateway.", show_default=False),
]
_Gateway = Annotated[str, typer.Option(help="host:port of the gateway's HTTP port.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
_Drafter = Annotated[str, typer.Option(help="model, or model:NAME for one of a bank.")]
_Version = Annotated[
    str, typer.Argument(metavar="VERSION", help="Version, or a beginning no other has.")
]


def list_drafts(
    drafter: Annotated[str, typer.Option(help="Of this drafter only.", show_default=False)] = "",
    endpoint: _Endpoint = None,
    gateway: _Gateway = DEFAULT_GATEWAY,
    as_json: _AsJson = False,
) -> None:
    """List all versions, newest first."""
    records = _ask("list", endpoint, gateway, lambda client: client.list(drafter))
    if as_json:
        print(json.dumps([_values(record) for record in records]))
    else:
        _print(_table(records))


def show(
    version: _Version,
    endpoint: _Endpoint = None,
    gateway: _Gateway = DEFAULT_GATEWAY,
    as_json: _AsJson = False,
) -> None:
    """Show one version with its scores and all that was decided about it."""
    _report(_ask("show", endpoint, gateway, lambda client: client.get(version)), as_json)


def rollback(
    version: Annotated[
        str, typer.Argument(metavar="[VERSION]", help="Where to; the one before by default.")
    ] = "",
    drafter: _Drafter = "model",
    endpoint: _Endpoint = None,
    gateway: _Gateway = DEFAULT_GATEWAY,
    as_json: _AsJson = False,
) -> None:
    """Go back to an earlier version, at once and everywhere."""
    call = lambda client: client.rollback(drafter, version)  # noqa: E731
    _report(_ask("rollback", endpoint, gateway, call), as_json)


def pin(
    version: _Version,
    drafter: _Drafter = "model",
    endpoint: _Endpoint = None,
    gateway: _Gateway = DEFAULT_GATEWAY,
    as_json: _AsJson = False,
) -> None:
    """Use a version, whatever training brings, until it is unpinned."""
    call = lambda client: client.pin(drafter, version)  # noqa: E731
    _report(_ask("pin", endpoint, gateway, call), as_json)


def unpin(
    drafter: _Drafter = "model",
    endpoint: _Endpoint = None,
    gateway: _Gateway = DEFAULT_GATEWAY,
    as_json: _AsJson = False,
) -> None:
    """Let training exchange the version in use again."""
    _report(_ask("unpin", endpoint, gateway, lambda client: client.pin(drafter, "")), as_json)


def remove(
    drafter: Annotated[str, typer.Argument(metavar="NAME", help="model:NAME, one of a bank.")],
    endpoint: _Endpoint = None,
    gateway: _Gateway = DEFAULT_GATEWAY,
    as_json: _AsJson = False,
) -> None:
    """Take a drafter out of the bank: nobody drafts with any version of it."""
    _report(_ask("remove", endpoint, gateway, lambda client: client.remove(drafter)), as_json)


def offer(
    directory: Annotated[Path, typer.Argument(help="Checkpoint directory of the draft.")],
    force: Annotated[bool, typer.Option(help="Put it on trial without asking the gate.")] = False,
    drafter: _Drafter = "model",
    endpoint: _Endpoint = None,
    gateway: _Gateway = DEFAULT_GATEWAY,
    as_json: _AsJson = False,
) -> None:
    """Hand a checkpoint to the trainer; unless forced, the gate decides."""
    try:
        paths = _checkpoint(directory)
    except CommandError as error:
        leave("draft offer", error)
    call = lambda client: client.offer(paths, drafter, force)  # noqa: E731
    record = _ask("offer", endpoint, gateway, call)
    _report(record, as_json)
    if record.stage is DraftStage.REFUSED:
        reason = record.decisions[-1].reason if record.decisions else "refused"
        leave("draft offer", CommandError(f"{record.version} was refused: {reason}"))


def _ask(
    command: str, endpoint: str | None, gateway: str, call: Callable[[DraftClient], Awaitable[T]]
) -> T:
    """Make one call, or leave with what went wrong."""

    async def run(address: str) -> T:
        async with open_draft_client(address) as client:
            return await call(client)

    try:
        return asyncio.run(run(endpoint or find_trainer(gateway)))
    except CommandError as error:
        leave(f"draft {command}", error)
    except (PacelineError, OSError, ValueError) as error:
        text = describe_error(error) if isinstance(error, PacelineError) else str(error)
        leave(f"draft {command}", CommandError(text))


def find_trainer(gateway: str) -> str:
    """Return host:port of the fleet's trainer.

    Raises:
        CommandError: no gateway answers there, or its fleet has no trainer.
    """
    members = fetch_status(gateway).get("members") or []
    trainers = [m for m in members if m.get("role") == Role.TRAINER.value]
    for member in sorted(trainers, key=lambda m: bool(m.get("is_draining"))):
        return str(member["address"])
    raise CommandError(f"the fleet of {gateway} has no trainer")


def _checkpoint(directory: Path) -> list[Path]:
    """Return the files that make a draft; others beside them are left out.

    Raises:
        CommandError: there is no checkpoint.
    """
    if not (directory / CONFIG).is_file():
        raise CommandError(f"{directory} holds no {CONFIG}, so it is no checkpoint")
    paths = [p for p in sorted(directory.iterdir()) if p.is_file() and is_draft_file(p.name)]
    if not any(path.name.endswith(WEIGHTS_SUFFIX) for path in paths):
        raise CommandError(f"{directory} holds no safetensors; nothing else is read")
    return paths


def _report(record: DraftRecord, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_values(record)))
    else:
        _print(_page(record))


def _values(record: DraftRecord) -> dict[str, Any]:
    """Return a record under the names of the contract."""
    decisions = [asdict(d) | {"stage": d.stage.value} for d in record.decisions]
    return asdict(record) | {"stage": record.stage.value, "decisions": decisions}


def _print(content: RenderableType) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(content)


def _table(records: Sequence[DraftRecord]) -> RenderableType:
    if not records:
        return Text("no versions")
    table = _plain_table(("version", "drafter", "stage", "made", "parent", "why"))
    for name in ("MB", "accepted", "before"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        score = record.scores[0] if record.scores else None
        table.add_row(
            record.version,
            record.drafter,
            _stage(record),
            _time(record.created_s),
            record.parent,
            record.decisions[-1].reason if record.decisions else "",
            f"{record.num_bytes / 1e6:.1f}",
            f"{score.acceptance:.3f}" if score else "",
            f"{score.incumbent_acceptance:.3f}" if score else "",
        )
    return table


def _page(record: DraftRecord) -> RenderableType:
    head = (
        f"{record.version}   {record.drafter}   {_stage(record)}\n"
        f"digest {record.digest}\n"
        f"number {record.number}, made {_time(record.created_s)}, {record.num_bytes} bytes, "
        f"from {record.parent or 'nothing'} "
        f"with {record.num_tokens} tokens of {record.num_samples} samples"
        + (f", by differences of rank {record.rank}" if record.rank else "")
    )
    parts: list[RenderableType] = [Text(head)]
    if record.scores:
        scores = _plain_table(("domain", "positions", "accepted", "before", "difference"))
        for s in record.scores:
            cells = (f"{s.acceptance:.4f}", f"{s.incumbent_acceptance:.4f}")
            bounds = f"{s.difference_low:+.4f} .. {s.difference_high:+.4f}"
            scores.add_row(s.domain or "all", str(s.num_positions), *cells, bounds)
        parts.append(scores)
    decisions = _plain_table(("when", "stage", "reason", "detail"))
    for d in record.decisions:
        decisions.add_row(_time(d.at_s), d.stage.value, d.reason, d.detail)
    return Group(*parts, decisions)


def _plain_table(names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, no_wrap=name != "detail")
    return table


def _stage(record: DraftRecord) -> str:
    marks = [record.stage.value]
    marks += ["floor"] * record.is_floor + ["pinned"] * record.is_pinned
    return ", ".join(marks)


def _time(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))
