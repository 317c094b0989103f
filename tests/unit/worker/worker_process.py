"""Real worker processes and what a gateway would say to them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc

from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member
from paceline.process.membership import Membership
from paceline.rpc.channel import open_channel
from paceline.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from tests.unit.kvstore.node_process import FLEET
from tests.waiting import until

MODEL = Path(__file__).parents[3] / "models" / "demo"
CHUNK_TOKENS = 64
VOCABULARY = 4096
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
START_TIMEOUT_S = 60.0


@dataclass
class WorkerProcess:
    """One `python -m paceline.worker`; its log lies in `directory`."""

    redis_url: str
    directory: Path
    worker_id: str
    role: str = "decode"
    kv_node: str = ""
    model: Path = MODEL
    flags: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def pid(self) -> int:
        """Return the process id."""
        assert self.process is not None
        return self.process.pid

    @property
    def engine_pid(self) -> int:
        """Return the process id of the engine."""
        (engine,) = children(self.pid)
        return engine

    @property
    def log(self) -> str:
        """Return what the worker and its engine wrote on stderr."""
        return (self.directory / f"{self.worker_id}.log").read_text()

    @property
    def log_lines(self) -> list[dict[str, Any]]:
        """Return the log's lines as objects."""
        return [json.loads(line) for line in self.log.splitlines()]

    def events(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """Return the log's lines of one event with these fields."""
        return [
            line
            for line in self.log_lines
            if line["event"] == event and all(line.get(k) == v for k, v in fields.items())
        ]

    def launch(self) -> None:
        """Start the process."""
        command = [sys.executable, "-m", "paceline.worker", "--role", self.role]
        command += ["--model", str(self.model), "--redis-url", self.redis_url, "--fleet", FLEET]
        command += ["--member-id", self.worker_id, "--kv-node", self.kv_node]
        command += ["--num-kv-blocks", "256", "--chunk-tokens", str(CHUNK_TOKENS)]
        with open(self.directory / f"{self.worker_id}.log", "ab") as log:
            self.process = subprocess.Popen([*command, *self.flags], stderr=log)

    async def start(self) -> Member:
        """Start the process and return its record once it is a member, attached if it can be."""
        self.launch()
        return await self.member()

    async def member(self, *, is_attached: bool = True) -> Member:
        """Wait for the running process to be a member."""

        def is_ready(member: Member) -> bool:
            return bool(member.node_id) == (is_attached and bool(self.kv_node))

        async def find() -> Member | None:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            found = [m for m in await members(self.redis_url) if m.pid == self.pid]
            return next(filter(is_ready, found), None)

        return await until(find, START_TIMEOUT_S)  # type: ignore[arg-type]

    async def exit_code(self, timeout_s: float = 10.0) -> int:
        """Wait for the process to end by itself."""
        process = self.process
        assert process is not None
        await until(lambda: process.poll() is not None, timeout_s)
        assert process.returncode is not None
        return process.returncode

    def signal(self, number: int) -> None:
        """Send a signal to the worker."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once; its engine ends with it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=10)

    async def stop(self) -> int:
        """End the process in order; return its exit code."""
        self.signal(signal.SIGTERM)
        return await self.exit_code()


async def members(redis_url: str) -> list[Member]:
    """Return the live members, none while Redis is away."""
    membership = Membership(redis_url, FLEET)
    try:
        return await membership.members()
    except UnavailableError:
        return []
    finally:
        await membership.close()


@dataclass
class Answer:
    """What came of one call: messages, tokens by output, hits of the first report."""

    messages: list[Any] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Return the tokens of output 0."""
        return [
            token
            for message in self.messages
            for chunk in message.chunks
            if chunk.index == 0
            for token in chunk.token_ids
        ]

    @property
    def store_hit_tokens(self) -> int:
        """Return the prompt tokens that came from the store."""
        return sum(message.store_hit_tokens for message in self.messages)

    @property
    def local_hit_tokens(self) -> int:
        """Return the prompt tokens that the worker had."""
        return sum(message.local_hit_tokens for message in self.messages)


class Caller:
    """The stubs of one worker."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        stubs: Any = worker_pb2_grpc
        self.prefiller = stubs.PrefillServiceStub(channel)
        self.decoder = stubs.DecodeServiceStub(channel)
        self.worker = stubs.WorkerServiceStub(channel)

    def open_prefill(self, spec: Any, sources: tuple[str, ...] = (), log_id: str = "") -> Any:
        """Start a prefill call."""
        request = worker_pb2.PrefillRequest(spec=spec, kv_sources=sources)
        return self.prefiller.Prefill(request, timeout=60, metadata=_metadata(log_id))

    def open_decode(self, spec: Any, sources: tuple[str, ...] = (), log_id: str = "") -> Any:
        """Start a decode call."""
        request = worker_pb2.DecodeRequest(spec=spec, kv_sources=sources)
        return self.decoder.Decode(request, timeout=60, metadata=_metadata(log_id))

    async def prefill(self, spec: Any, sources: tuple[str, ...] = (), log_id: str = "") -> Answer:
        """Compute and publish a prompt."""
        return Answer([message async for message in self.open_prefill(spec, sources, log_id)])

    async def decode(self, spec: Any, sources: tuple[str, ...] = (), log_id: str = "") -> Answer:
        """Generate to the end."""
        return Answer([message async for message in self.open_decode(spec, sources, log_id)])

    async def integrity(self) -> worker_pb2.CheckIntegrityResponse:
        """Check the worker's books."""
        report: worker_pb2.CheckIntegrityResponse = await self.worker.CheckIntegrity(
            worker_pb2.CheckIntegrityRequest(), timeout=10
        )
        return report

    async def until_idle(self, timeout_s: float = 10.0) -> None:
        """Wait until the worker holds nothing for anybody; its books must be right."""

        async def is_idle() -> bool:
            report = await self.integrity()
            assert not report.violations
            return not (report.num_requests or report.num_held_blocks or report.num_streams)

        await until(is_idle, timeout_s)


@asynccontextmanager
async def calling(member: Member) -> AsyncIterator[Caller]:
    """Connect to a worker."""
    channel = open_channel(member.address)
    try:
        yield Caller(channel)
    finally:
        await channel.close()


def make_spec(prompt: list[int], max_tokens: int = 8, request_id: str = "", **fields: Any) -> Any:
    """Return a greedy request that ends only by its length."""
    return worker_pb2.GenerationSpec(
        request_id=request_id or f"request-{time.monotonic_ns()}",
        prompt_token_ids=prompt,
        sampling=inference_pb2.SamplingParams(temperature=0.0),
        max_tokens=max_tokens,
        ignore_eos=True,
        n=1,
        **fields,
    )


def make_prompt(num_tokens: int, seed: int) -> list[int]:
    """Return distinct tokens; equal arguments give equal prompts."""
    draw = random.Random(seed)
    return [draw.randrange(2, VOCABULARY) for _ in range(num_tokens)]


def metric(member: Member, name: str) -> float:
    """Read one metric of a process."""
    with urlopen(f"http://{member.metrics_address}/metrics", timeout=5) as page:
        for line in page.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
    raise AssertionError(f"no metric {name}")


def children(pid: int) -> list[int]:
    """Return the process ids of a process's children."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def num_fds(pid: int) -> int:
    """Count the open files of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def num_mappings(pid: int, path: Path) -> int:
    """Count the mappings of a file in a process, also if it was unlinked."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum(str(path) in line for line in lines)


def _metadata(log_id: str) -> tuple[tuple[str, str], ...] | None:
    if not log_id:
        return None
    return ("x-request-id", log_id), ("traceparent", f"00-{TRACE_ID}-00f067aa0ba902b7-00")
