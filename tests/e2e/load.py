"""Clients that keep a platform busy, and what they must have been answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from paceline.v1.inference_pb2 import GenerateRequest, SamplingParams, TokenIds
from tests.checkpoints import DEMO
from tests.e2e.client import Answer, Client, assert_greedy
from tests.platform import Platform
from tests.waiting import until

NUM_CLIENTS = 4
MAX_TOKENS = 48


def prompt_ids(number: int) -> list[int]:
    """Return a prompt of its own of 40 to 140 tokens."""
    return [5 + (number * 37 + i * i * 7) % 4000 for i in range(40 + number * 17 % 100)]


def request_for(number: int, **fields: object) -> GenerateRequest:
    return GenerateRequest(
        token_ids=TokenIds(ids=prompt_ids(number)),
        sampling=SamplingParams(temperature=0.0),
        ignore_eos=True,
        **{"max_tokens": MAX_TOKENS, **fields},  # type: ignore[arg-type]
    )


class Load:
    """Clients that send one request after the other until told to stop."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._is_over = asyncio.Event()
        self._num_sent = 0
        self.answers: dict[int, Answer] = {}

    async def run_client(self) -> None:
        while not self._is_over.is_set():
            self._num_sent += 1
            number = self._num_sent
            self.answers[number] = await self._client.generate(request_for(number), timeout=90)

    async def until_answered(self, more: int) -> None:
        """Wait for so many more answers."""
        target = len(self.answers) + more
        await until(lambda: len(self.answers) >= target, 90)

    def stop(self) -> None:
        self._is_over.set()

    def assert_right(self) -> None:
        """Check every token that was answered against the reference."""
        assert self.answers
        for number, answer in self.answers.items():
            assert len(answer.ids[0]) == MAX_TOKENS
            assert_greedy(DEMO, prompt_ids(number), answer.ids[0])


@asynccontextmanager
async def load(platform: Platform) -> AsyncIterator[Load]:
    """Put the platform under load; a failed request fails the test."""
    async with Client(platform.grpc) as client:
        running = Load(client)
        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_CLIENTS):
                group.create_task(running.run_client())
            try:
                await running.until_answered(NUM_CLIENTS)
                yield running
            finally:
                running.stop()
    running.assert_right()
