"""Reads recorded loads: who asked when, for how much, with which shared prefix.

Three forms, told apart by their first line:

- Azure LLM inference traces: CSV with TIMESTAMP, ContextTokens, GeneratedTokens.
- Mooncake traces: JSON lines with timestamp (ms), input_length, output_length and hash_ids, one
  per block of 512 tokens of the prompt; equal ids in front are an equal prefix.
- Ours: JSON lines with at_s, prompt_tokens, output_tokens and, if wanted, prefix_ids like
  hash_ids, of prefix_block_tokens (default 512) each.

Times count from the first request. Lines out of order are sorted.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from paceline.cli.errors import CommandError

BLOCK_TOKENS = 512
"""Tokens per prefix id where the trace does not say."""

_T = TypeVar("_T")

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a load."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()
    """Blocks of the prompt from its start, the last one partial; equal ids are equal prefixes."""
    block_tokens: int = BLOCK_TOKENS
    """Tokens per id."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded load, in order of time."""

    name: str
    form: str
    """azure, mooncake or paceline."""
    arrivals: tuple[Arrival, ...]

    @property
    def duration_s(self) -> float:
        """When the last request comes."""
        return self.arrivals[-1].at_s


def read_trace(path: Path) -> Trace:
    """Return a trace of any known form.

    Raises:
        CommandError: the file cannot be read, or a line is wrong; says which, and which field.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: {error}") from error
    first = next((line for line in lines if line.strip()), "")
    if not first:
        raise CommandError(f"{path}: the trace is empty")
    if first.lstrip().startswith("{"):
        form, arrivals = _read_json_lines(path, lines)
    elif _AZURE[0] in first:
        form, arrivals = "azure", list(_read_azure(path, lines))
    else:
        raise CommandError(
            f"{path}:1: neither a CSV header with {', '.join(_AZURE)} nor a JSON object"
        )
    if not arrivals:
        raise CommandError(f"{path}: the trace has no requests")
    arrivals.sort(key=lambda arrival: arrival.at_s)
    start_s = arrivals[0].at_s
    shifted = (replace(arrival, at_s=arrival.at_s - start_s) for arrival in arrivals)
    return Trace(path.name, form, tuple(shifted))


# -- CSV ----------------------------------------------------------------------------------


def _read_azure(path: Path, lines: list[str]) -> Iterator[Arrival]:
    reader = csv.DictReader(lines)
    missing = [name for name in _AZURE if name not in (reader.fieldnames or ())]
    if missing:
        raise CommandError(f"{path}:1: no column {', '.join(missing)}")
    start: datetime | None = None
    for row in reader:
        where = f"{path}:{reader.line_num}"
        moment, fraction_s = _field(where, _AZURE[0], row[_AZURE[0]], _moment)
        start = start or moment
        yield Arrival(
            at_s=(moment - start).total_seconds() + fraction_s,
            prompt_tokens=_field(where, _AZURE[1], row[_AZURE[1]], _count),
            output_tokens=_field(where, _AZURE[2], row[_AZURE[2]], _count),
        )


def _moment(text: Any) -> tuple[datetime, float]:
    """Return whole seconds and the rest: the traces have seven digits of it, Python six."""
    whole, _, fraction = str(text).strip().partition(".")
    digits = fraction.removesuffix("Z").partition("+")[0]
    moment = datetime.fromisoformat(whole).replace(tzinfo=None)
    return moment, int(digits) / 10 ** len(digits) if digits else 0.0


# -- JSON lines ---------------------------------------------------------------------------


def _read_json_lines(path: Path, lines: list[str]) -> tuple[str, list[Arrival]]:
    arrivals: list[Arrival] = []
    form = ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            data = json.loads(line)
        except ValueError as error:
            raise CommandError(f"{where}: not JSON: {error}") from error
        if not isinstance(data, dict):
            raise CommandError(f"{where}: not a JSON object")
        form = form or ("paceline" if "at_s" in data else "mooncake")
        arrivals.append((_ours if form == "paceline" else _mooncake)(where, data))
    return form, arrivals


def _mooncake(where: str, data: dict[str, Any]) -> Arrival:
    ids = _field(where, "hash_ids", data.get("hash_ids", []), _ids)
    return Arrival(
        at_s=_field(where, "timestamp", data.get("timestamp"), _seconds) / 1e3,
        prompt_tokens=_field(where, "input_length", data.get("input_length"), _count),
        output_tokens=_field(where, "output_length", data.get("output_length"), _count),
        prefix_ids=ids,
    )


def _ours(where: str, data: dict[str, Any]) -> Arrival:
    block = data.get("prefix_block_tokens", BLOCK_TOKENS)
    return Arrival(
        at_s=_field(where, "at_s", data.get("at_s"), _seconds),
        prompt_tokens=_field(where, "prompt_tokens", data.get("prompt_tokens"), _count),
        output_tokens=_field(where, "output_tokens", data.get("output_tokens"), _count),
        prefix_ids=_field(where, "prefix_ids", data.get("prefix_ids", []), _ids),
        block_tokens=_field(where, "prefix_block_tokens", block, _count),
    )


# -- fields -------------------------------------------------------------------------------


def _field(where: str, name: str, value: Any, read: Callable[[Any], _T]) -> _T:
    if value is None:
        raise CommandError(f"{where}: {name} is missing")
    try:
        return read(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise CommandError(f"{where}: {name} {value!r}: {error}") from error


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0.0 <= seconds < float("inf"):
        raise ValueError("expected a time from 0 on")
    return seconds


def _count(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    count = int(value)
    if count < 1 or count != float(value):
        raise ValueError("expected a whole number from 1 on")
    return count


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, Iterable) or isinstance(value, str | dict):
        raise ValueError("expected a list of numbers")
    return tuple(int(item) for item in value)
