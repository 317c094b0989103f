"""The demo's last round: a draft made in seconds learns from traffic of one kind, on spare time.

A platform of its own starts with that draft. What is shown is measured: drafted and accepted
tokens of the answers' usage, and the version that drafted for them.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console

from paceline.cli.client import open_client
from paceline.cli.demo.asking import Answer, ask, conversation
from paceline.cli.demo.platform import running_platform
from paceline.cli.demo.prompts import SUMS
from paceline.cli.errors import CommandError

_DRAFT_MINUTES = "0.05"
_CREATE_TIMEOUT_S = 120.0
_LONGEST_S = 75.0
_SHOW_EVERY_S = 3.0
_WINDOW = 20
"""Requests of a moving figure."""
_ENOUGH = 0.25
"""Gain of acceptance at which there is nothing more to wait for."""
_MAX_TOKENS = 48


class DraftNotMadeError(CommandError):
    """No draft can be made for this model in the time there is."""


@dataclass(slots=True)
class Learning:
    """What the round brought."""

    answers: list[Answer] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    """That drafted, in the order of their coming."""

    @property
    def first(self) -> float:
        """Acceptance of the first requests."""
        return acceptance(self.answers[:_WINDOW])

    @property
    def last(self) -> float:
        """Acceptance of the last ones."""
        return acceptance(self.answers[-_WINDOW:])

    def note(self, answer: Answer) -> None:
        """Take an answer."""
        self.answers.append(answer)
        version = answer.usage.draft_version
        if version and version not in self.versions:
            self.versions.append(version)

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return {
            "requests": len(self.answers),
            "acceptance_first": round(self.first, 3),
            "acceptance_last": round(self.last, 3),
            "versions": len(self.versions),
        }


def acceptance(answers: list[Answer]) -> float:
    """Return the share of drafted tokens that were accepted."""
    drafted = sum(answer.usage.drafted_tokens for answer in answers)
    return sum(answer.usage.accepted_tokens for answer in answers) / drafted if drafted else 0.0


async def watch_learning(model: Path, directory: Path, console: Console) -> Learning:
    """Make a draft, send traffic, print acceptance and version until it has learned, or time is up.

    Raises:
        DraftNotMadeError: the model is not one that drafts can be made for.
        CommandError: the platform did not start.
    """
    draft = directory / "draft"
    await _make_draft(model, draft)
    flags = ("--model", str(model), "--draft", str(draft), "--trainer")
    registry = ("--draft-registry", str(directory / "registry"))
    learning = Learning()
    async with running_platform(*flags, *registry) as platform:
        endpoint = await platform.wait_ready()
        async with open_client(endpoint) as client:
            begun_s = shown_s = time.monotonic()
            recent: deque[Answer] = deque(maxlen=_WINDOW)
            for prompt in cycle(SUMS):
                answer = await ask(
                    client, conversation(prompt), max_tokens=_MAX_TOKENS, mode="model"
                )
                learning.note(answer)
                recent.append(answer)
                now_s = time.monotonic()
                if now_s - shown_s >= _SHOW_EVERY_S:
                    shown_s = now_s
                    _show(console, learning, list(recent), now_s - begun_s)
                is_learned = len(learning.versions) > 1 and (
                    acceptance(list(recent)) > learning.first + _ENOUGH
                )
                if answer.error or is_learned or now_s - begun_s > _LONGEST_S:
                    _show(console, learning, list(recent), now_s - begun_s)
                    break
                # What the user does not use is the trainer's.
                await asyncio.sleep(0.1)
    return learning


def _show(console: Console, learning: Learning, recent: list[Answer], elapsed_s: float) -> None:
    steps = sum(answer.usage.target_steps for answer in recent)
    tokens = sum(answer.usage.completion_tokens for answer in recent)
    version = recent[-1].usage.draft_version
    console.print(
        f"  {elapsed_s:4.0f} s  {len(learning.answers):4d} requests   "
        f"acceptance {acceptance(recent):.2f}   {tokens / max(steps, 1):.2f} tokens per pass   "
        f"version {version}",
        soft_wrap=True,
    )


async def _make_draft(model: Path, directory: Path) -> None:
    command = (sys.executable, "-m", "paceline.cli", "draft", "create", "--target", str(model))
    process = await asyncio.create_subprocess_exec(
        *command,
        *("--out", str(directory), "--minutes", _DRAFT_MINUTES),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_CREATE_TIMEOUT_S):
            _, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise DraftNotMadeError("making a draft takes too long") from None
    if process.returncode:
        raise DraftNotMadeError(errors.decode(errors="replace").strip())
