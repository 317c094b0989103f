"""The demo's rounds: three on a platform of two prefill and two decode workers, one on another.

1  different prompts at once: KV goes prefill -> store -> decode
2  one long prefix, several questions: what one worker computed, another one finds
3  a conversation whose decode worker is killed between the turns
4  a draft made in seconds learns from traffic of one kind (learning.py)
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from paceline.cli.client import InferenceClient, open_client
from paceline.cli.demo.asking import Answer, ask, conversation
from paceline.cli.demo.board import Board
from paceline.cli.demo.kv_tally import KvTally
from paceline.cli.demo.learning import DraftNotMadeError, watch_learning
from paceline.cli.demo.platform import DemoPlatform, running_platform
from paceline.cli.demo.prompts import (
    CONCURRENT_PROMPTS,
    CONVERSATION,
    PREFIX_QUESTIONS,
    SHARED_PREFIX,
)
from paceline.cli.demo.report import Replacement, Report, find_prefix_hit
from paceline.cli.errors import CommandError, leave
from paceline.cli.up import find_model

INTERRUPTED_EXIT_CODE = 130
_MAX_PREFIX_ROUNDS = 3
"""The index learns of new blocks a moment after they are readable: ask again if too early."""
_REPLACE_TIMEOUT_S = 30.0


def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint directory; models/demo by default.", show_default=False),
    ] = None,
) -> None:
    """Start a platform on free ports, send it real requests and check what it promises."""
    try:
        report = asyncio.run(_run(find_model(model), Console(highlight=False)))
    except CommandError as error:
        leave("demo", error)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    failures = report.failures()
    if failures:
        typer.echo(f"paceline demo failed: {'; '.join(failures)}", err=True)
    print(json.dumps(report.to_json()), flush=True)
    raise typer.Exit(1 if failures else 0)


async def _run(model: Path, console: Console) -> Report:
    started_s = time.monotonic()
    console.print(f"Starting 2 prefill and 2 decode workers with {model}", soft_wrap=True)
    flags = ("--model", str(model), "--prefill", "2", "--decode", "2")
    async with running_platform(*flags) as platform:
        endpoint = await platform.wait_ready()
        console.print(f"Ready at {endpoint} after {time.monotonic() - started_s:.1f} s")
        async with open_client(endpoint) as client:
            report = await Demo(platform, client, console).run(started_s)
    console.print("\n4. A draft made in three seconds learns from live traffic", style="bold")
    with tempfile.TemporaryDirectory(prefix="paceline-demo-draft-") as directory:
        try:
            learning = await watch_learning(model, Path(directory), console)
        except DraftNotMadeError as error:
            console.print(f"  left out: {error}", soft_wrap=True)
            learning = None
    elapsed_s = time.monotonic() - started_s
    report = dataclasses.replace(report, learning=learning, elapsed_s=elapsed_s)
    console.print(report.table())
    return report


class Demo:
    """The rounds, on one platform."""

    def __init__(self, platform: DemoPlatform, client: InferenceClient, console: Console) -> None:
        self._platform = platform
        self._client = client
        self._console = console
        self._tally = KvTally()

    async def run(self, started_s: float) -> Report:
        """Run all rounds and report."""
        self._console.print(
            "The demo model is tiny: its sentences look right, its facts and sums are not.\n"
        )
        self._console.print(f"1. {len(CONCURRENT_PROMPTS)} prompts at once", style="bold")
        answers, tok_s = await self._concurrent()
        self._console.print("\n2. Questions behind one long prefix", style="bold")
        first, later = await self._prefix()
        self._console.print("\n3. A worker is killed within a conversation", style="bold")
        replacement = await self._replacement()
        await self._tally.update(await self._platform.members())
        turns = (replacement.first_turn, replacement.second_turn)
        return Report(
            answers=(*answers, first, *later, *turns),
            tok_s=tok_s,
            prefix_first=first,
            prefix_hit=find_prefix_hit(first, later),
            replacement=replacement,
            moved=self._tally.total(),
            elapsed_s=time.monotonic() - started_s,
        )

    async def _concurrent(self) -> tuple[list[Answer], float]:
        started_s = time.monotonic()
        prompts = list(CONCURRENT_PROMPTS)
        answers = await self._ask_all(prompts, prompts, max_tokens=64, temperature=0.7)
        num_tokens = sum(answer.usage.completion_tokens for answer in answers)
        return answers, num_tokens / (time.monotonic() - started_s)

    async def _prefix(self) -> tuple[Answer, list[Answer]]:
        """Ask one question, then the others at once, until one shows the hit that we look for."""
        first_question, *others = PREFIX_QUESTIONS
        (first,) = await self._ask_all(
            [first_question], [SHARED_PREFIX + first_question], max_tokens=24
        )
        later: list[Answer] = []
        for _ in range(_MAX_PREFIX_ROUNDS):
            prompts = [SHARED_PREFIX + question for question in others]
            later += await self._ask_all(others, prompts, max_tokens=24)
            if find_prefix_hit(first, later) is not None:
                break
        return first, later

    async def _replacement(self) -> Replacement:
        question, next_question = CONVERSATION
        turn = await self._ask_turn(question)
        worker = turn.usage.decode_worker
        if not worker:
            raise CommandError(f"the first turn of the conversation failed: {turn.error}")
        await self._tally.update(await self._platform.members())
        pid = self._platform.pid(worker)
        os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        self._console.print(f"  killed {worker} (process {pid})")
        next_turn = await self._ask_turn(question, turn.text, next_question)
        is_replaced = await self._platform.wait_for(
            lambda members: any(m.id == worker and m.pid != pid for m in members),
            _REPLACE_TIMEOUT_S,
        )
        replaced_in_s = time.monotonic() - killed_s if is_replaced else None
        return Replacement(worker, turn, next_turn, replaced_in_s)

    async def _ask_turn(self, *contents: str) -> Answer:
        with Board(self._console, [contents[-1]]) as board:
            return await ask(
                self._client,
                conversation(*contents),
                max_tokens=48,
                on_text=lambda answer: board.show(0, answer),
            )

    async def _ask_all(
        self, titles: list[str], prompts: list[str], *, max_tokens: int, temperature: float = 0.0
    ) -> list[Answer]:
        with Board(self._console, titles) as board:
            return await asyncio.gather(
                *(
                    ask(
                        self._client,
                        conversation(prompt),
                        max_tokens=max_tokens,
                        temperature=temperature,
                        seed=index + 1,
                        on_text=lambda answer, i=index: board.show(i, answer),  # type: ignore[misc]
                    )
                    for index, prompt in enumerate(prompts)
                )
            )
