"""Replays phases of prompts against a platform, and notes what came of every request.

One arm of `paceline bench online`. Acceptance is per token: of the positions at which a draft was
put to the test, the share at which it was right, read from the workers' metrics between requests.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from paceline.cli.client import InferenceClient, describe_error, open_client
from paceline.cli.demo.platform import DemoPlatform, running_platform
from paceline.cli.errors import CommandError
from paceline.cli.http_get import http_get
from paceline.domain.errors import PacelineError
from paceline.domain.member import Role
from paceline.v1 import inference_pb2

ARMS = ("off", "frozen", "online")

_TIMEOUT_S = 300.0
_SCRAPE_TIMEOUT_S = 5.0
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What is replayed, and how."""

    model: Path
    draft: Path | None
    phases: tuple[Path, ...]
    requests: int
    max_tokens: int
    concurrency: int
    busy: float
    temperature: float
    drafter: str
    threads: int
    deepen: int


@dataclass(frozen=True, slots=True)
class Asked:
    """One request and what it brought."""

    phase: int
    num_tokens: int
    target_steps: int
    ttft_s: float
    decode_s: float
    """From the first piece to the last."""
    gaps_s: tuple[float, ...]
    """Between pieces, shared out to their tokens."""
    tried: float
    accepted: float
    """Of the fleet since the request before; exact with one request at a time."""
    draft_version: str
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Arm:
    """What one way of drafting brought."""

    asked: list[Asked] = field(default_factory=list)
    swaps: int = 0
    max_swap_stall_s: float = 0.0
    rollbacks: int = 0
    spare_share: float | None = None
    trained_s: float = 0.0


async def replay(
    options: ReplayOptions, name: str, directory: Path, say: Callable[[str], None]
) -> Arm:
    """Start a platform for an arm, replay all phases, return what came of it.

    Raises:
        CommandError: a file of prompts cannot be used, the platform did not start, or a request
            failed.
    """
    phases = [_read(path) for path in options.phases]
    if not phases:
        raise CommandError("--phases: name at least one file")
    async with running_platform(*_flags(options, name, directory)) as platform:
        address = await platform.wait_ready()
        async with open_client(address) as client:
            arm = Arm()
            meters = _Meters(platform)
            warm = Asking(client, options, "OFF" if name == "off" else options.drafter)
            await warm.ask(phases[0][0], 0, _WARM_UP_TOKENS)
            await meters.read()
            for number, prompts in enumerate(phases):
                await _phase(options, warm, meters, prompts, number, arm)
                mean = _acceptance([a for a in arm.asked if a.phase == number])
                say(f"{name}: phase {number + 1} of {len(phases)}, acceptance {mean:.3f}")
            await meters.finish(arm)
    return arm


async def _phase(
    options: ReplayOptions,
    asking: Asking,
    meters: _Meters,
    prompts: Sequence[dict[str, Any]],
    number: int,
    arm: Arm,
) -> None:
    waiting = iter(range(options.requests))

    async def client() -> None:
        for i in waiting:
            begun_s = time.monotonic()
            asked = await asking.ask(prompts[i % len(prompts)], number, options.max_tokens)
            took_s = time.monotonic() - begun_s
            tried, accepted = await meters.read()
            arm.asked.append(_with_counts(asked, tried, accepted))
            # A user reads and thinks; what is left of the time is what training may use.
            await asyncio.sleep(took_s * (1.0 / options.busy - 1.0))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(options.concurrency):
            tasks.create_task(client())


class Asking:
    """Sends requests and times their pieces."""

    def __init__(self, client: InferenceClient, options: ReplayOptions, mode: str) -> None:
        self._client = client
        self._options = options
        self._mode = "AUTO" if mode == "auto" else mode

    async def ask(self, prompt: dict[str, Any], phase: int, max_tokens: int) -> Asked:
        """Return what a request brought.

        Raises:
            CommandError: it failed.
        """
        request = inference_pb2.GenerateRequest(
            sampling=inference_pb2.SamplingParams(temperature=self._options.temperature, seed=0),
            max_tokens=max_tokens,
            speculation=inference_pb2.SpeculationParams(mode=self._mode),
        )
        if "prompt" in prompt:
            request.prompt = prompt["prompt"]
        else:
            request.messages.messages.extend(
                inference_pb2.Message(role=m["role"], content=m["content"])
                for m in prompt["messages"]
            )
        begun_s = time.monotonic()
        pieces: list[tuple[float, int]] = []
        token_ids: list[int] = []
        usage = inference_pb2.Usage()
        try:
            async for response in self._client.generate(request, _TIMEOUT_S):
                if response.token_ids:
                    pieces.append((time.monotonic(), len(response.token_ids)))
                    token_ids += response.token_ids
                if response.HasField("usage"):
                    usage = response.usage
        except PacelineError as error:
            raise CommandError(f"a request failed: {describe_error(error)}") from error
        gaps: list[float] = []
        for (before_s, _), (at_s, count) in itertools.pairwise(pieces):
            gaps += [(at_s - before_s) / count] * count
        return Asked(
            phase=phase,
            num_tokens=len(token_ids),
            target_steps=usage.target_steps,
            ttft_s=pieces[0][0] - begun_s if pieces else 0.0,
            decode_s=pieces[-1][0] - pieces[0][0] if pieces else 0.0,
            gaps_s=tuple(gaps),
            tried=0.0,
            accepted=0.0,
            draft_version=usage.draft_version,
            token_ids=tuple(token_ids),
        )


class _Meters:
    """Reads counters of the fleet."""

    def __init__(self, platform: DemoPlatform) -> None:
        self._platform = platform
        self._addresses: dict[Role, list[str]] = {}
        self._tried = self._accepted = 0.0

    async def read(self) -> tuple[float, float]:
        """Return positions tried and accepted since the last call."""
        tried = accepted = 0.0
        for text in await self._texts(Role.DECODE):
            tried += _sum(text, "paceline_speculation_position_tried_total")
            accepted += _sum(text, "paceline_speculation_position_accepted_total")
        news = tried - self._tried, accepted - self._accepted
        self._tried, self._accepted = tried, accepted
        return news

    async def finish(self, arm: Arm) -> None:
        """Note the arm's totals."""
        for text in await self._texts(Role.DECODE):
            arm.swaps += round(_sum(text, "paceline_draft_swaps_total"))
            stall_s = _sum(text, "paceline_draft_swap_stall_max_seconds")
            arm.max_swap_stall_s = max(arm.max_swap_stall_s, stall_s)
        for text in await self._texts(Role.TRAINER):
            arm.rollbacks += round(
                _sum(text, "paceline_draft_decisions_total", stage="rolled-back")
            )
            offered_s = _sum(text, "paceline_trainer_spare_offered_core_seconds_total")
            granted_s = _sum(text, "paceline_trainer_spare_granted_core_seconds_total")
            arm.spare_share = granted_s / offered_s if offered_s else 0.0
            arm.trained_s += _sum(text, "paceline_trainer_trained_seconds_total")

    async def _texts(self, role: Role) -> list[str]:
        if role not in self._addresses:
            members = await self._platform.members()
            self._addresses[role] = [m.metrics_address for m in members if m.role is role]
        return [
            (
                await asyncio.to_thread(http_get, f"http://{address}/metrics", _SCRAPE_TIMEOUT_S)
            ).decode()
            for address in self._addresses[role]
        ]


def _sum(text: str, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def _acceptance(asked: Sequence[Asked]) -> float:
    tried = sum(a.tried for a in asked)
    return sum(a.accepted for a in asked) / tried if tried else 0.0


def _with_counts(asked: Asked, tried: float, accepted: float) -> Asked:
    return Asked(
        asked.phase,
        asked.num_tokens,
        asked.target_steps,
        asked.ttft_s,
        asked.decode_s,
        asked.gaps_s,
        tried,
        accepted,
        asked.draft_version,
        asked.token_ids,
    )


def _flags(options: ReplayOptions, name: str, directory: Path) -> list[str]:
    flags = ["--model", str(options.model), "--threads", str(options.threads)]
    if options.draft is not None:
        flags += ["--draft", str(options.draft)]
    if options.deepen:
        flags += ["--deepen", str(options.deepen)]
    if name == "online":
        return [*flags, "--trainer", "--draft-registry", str(directory / "registry")]
    return [*flags, "--no-trainer"]


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the prompts of a phase.

    Raises:
        CommandError: the file or a line of it cannot be used; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {path}: {error}") from error
    prompts: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            if "turns" in data:
                data = {"messages": [{"role": "user", "content": data["turns"][0]}]}
            if "prompt" in data:
                prompts.append({"prompt": str(data["prompt"])})
            else:
                messages = [
                    {"role": str(m["role"]), "content": str(m["content"])} for m in data["messages"]
                ]
                prompts.append({"messages": messages})
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CommandError(f"{path}:{number}: not a prompt ({error})") from error
    if not prompts:
        raise CommandError(f"{path}: no prompts")
    return prompts
