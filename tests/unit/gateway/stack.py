"""A gateway of real parts in the test's own event loop, wired as its main does it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import grpc

from paceline.domain.member import Member, Role
from paceline.gateway.auth import Authenticator
from paceline.gateway.fleet import FleetView
from paceline.gateway.parking import create_parking
from paceline.gateway.pipeline import Pipeline
from paceline.gateway.routing import create_policy
from paceline.gateway.server import SERVICE_NAME, InferenceServicer
from paceline.gateway.settings import GatewaySettings
from paceline.gateway.steps.lookup import LookupStep
from paceline.gateway.steps.route import RouteStep
from paceline.gateway.steps.tokenise import TokeniseStep
from paceline.gateway.tokenizer import ModelTokenizer
from paceline.kvstore.index import BlockIndex
from paceline.process.membership import Membership
from paceline.process.metrics import Metrics
from paceline.rpc.server import create_server
from paceline.v1 import inference_pb2, inference_pb2_grpc
from paceline.v1.inference_pb2 import GenerateRequest, SamplingParams, TokenIds
from tests.refusal import Refusal, refusal_of
from tests.unit.gateway.scripted_worker import ScriptedWorker, Stage
from tests.waiting import until

DEMO = Path(__file__).parents[3] / "models" / "demo"

LONG_PROMPT = [5 + i % 4000 for i in range(600)]
"""Long enough to be computed by a prefill worker."""


@lru_cache(maxsize=1)
def demo_tokenizer() -> ModelTokenizer:
    return ModelTokenizer(DEMO)


@dataclass
class Answer:
    """All that came back for one request, by output index."""

    responses: list[inference_pb2.GenerateResponse] = field(default_factory=list)
    ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    finish_reason: dict[int, int] = field(default_factory=dict)
    usage: dict[int, inference_pb2.Usage] = field(default_factory=dict)

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        """Book a message; nothing may come for an output that has ended."""
        index = response.index
        assert index not in self.finish_reason, f"output {index} goes on after its end"
        self.responses.append(response)
        self.ids.setdefault(index, []).extend(response.token_ids)
        self.text[index] = self.text.get(index, "") + response.text
        self.logprobs.setdefault(index, []).extend(p.logprob for p in response.logprobs)
        if response.finish_reason:
            self.finish_reason[index] = response.finish_reason
            self.usage[index] = response.usage


class Stack:
    """A gateway, its workers and a client. Use as a context."""

    def __init__(self, redis_url: str, **settings: Any) -> None:
        self.redis_url = redis_url
        self.name = f"test-{uuid.uuid4().hex[:8]}"
        self.stage = Stage()
        self.workers: list[ScriptedWorker] = []
        self.settings = GatewaySettings(
            model=DEMO, redis_url=redis_url, fleet=self.name, grpc_port=0, **settings
        )
        self.metrics = Metrics("gateway")
        self._exits = AsyncExitStack()

    async def __aenter__(self) -> Self:
        settings = self.settings
        tokenizer = demo_tokenizer()
        membership = Membership(self.redis_url, self.name)
        self._exits.push_async_callback(membership.close)
        self.fleet = FleetView(membership, settings.model_name, self.metrics.redis_up.set)
        self._exits.push_async_callback(self.fleet.close)
        index = BlockIndex(self.redis_url, self.name)
        self._exits.push_async_callback(index.close)
        tokenise = TokeniseStep(tokenizer, settings.default_max_tokens, lambda: 7)
        lookup = LookupStep(index)
        policy = create_policy(settings.routing_policy)
        self.parking = create_parking(self.fleet, settings)
        route = RouteStep(self.fleet, policy, self.parking, settings, self.metrics)
        self.pipeline = Pipeline(
            settings, self.fleet, tokenizer, tokenise, lookup, self.parking, route, self.metrics
        )
        authenticator = Authenticator.from_file(settings.api_keys)
        servicer = InferenceServicer(self.pipeline, tokenise, self.fleet, authenticator, settings)
        add: Any = inference_pb2_grpc.add_InferenceServiceServicer_to_server
        server = create_server(
            self.metrics,
            [SERVICE_NAME],
            [lambda target: add(servicer, target)],
            host="127.0.0.1",
            port=0,
            write_timeout_s=settings.slow_client_timeout_s,
        )
        await server.start()
        self._exits.push_async_callback(server.drain, 0.0)
        self.address = server.address
        for coroutine in (self.fleet.run(), self.parking.run()):
            self._exits.push_async_callback(_end, asyncio.create_task(coroutine))
        self.channel = grpc.aio.insecure_channel(server.address)
        self._exits.push_async_callback(self.channel.close)
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        for worker in self.workers:
            await worker.__aexit__()
        await self._exits.aclose()

    async def add(self, role: Role = Role.DECODE, count: int = 1, **options: Any) -> ScriptedWorker:
        """Start workers, wait until the gateway knows them; return the last one."""
        added = [
            ScriptedWorker(self.stage, self.redis_url, self.name, role, **options)
            for _ in range(count)
        ]
        self.workers += added
        for worker in added:
            await worker.start()
        await until(lambda: all(map(self.knows, added)))
        return added[-1]

    def knows(self, worker: ScriptedWorker) -> bool:
        """Whether the gateway sees the worker at its present address."""
        known = {(m.id, m.address) for m in self.fleet.members()}
        return (worker.member.id, worker.member.address) in known

    def member(self, worker: ScriptedWorker) -> Member:
        """Return the gateway's record of a worker."""
        return next(m for m in self.fleet.members() if m.id == worker.member.id)

    # -- client ---------------------------------------------------------------------------

    def call(self, request: GenerateRequest, timeout: float | None = 20.0) -> Any:
        """Start a call."""
        return self.stub.Generate(request, timeout=timeout)

    async def generate(self, request: GenerateRequest, timeout: float | None = 20.0) -> Answer:
        """Return the whole answer."""
        answer = Answer()
        async for response in self.call(request, timeout):
            answer.add(response)
        assert len(answer.usage) == (request.n or 1), "an output has no end"
        return answer

    async def refused(self, request: GenerateRequest, timeout: float | None = 20.0) -> Refusal:
        """Send a request that must fail; return why it did."""
        try:
            answer = await self.generate(request, timeout)
        except grpc.aio.AioRpcError as error:
            return refusal_of(error)
        raise AssertionError(f"answered: {answer.text}")

    def at_rest(self) -> bool:
        """Whether nothing is held or counted for any request, here or at a worker."""
        return (
            self.pipeline.admission.num_running == 0
            and not any(self.fleet.in_flight.values())
            and not any(self.fleet.pending_tokens.values())
            and not any(worker.num_running for worker in self.workers)
            and value_of(self.metrics.requests_running) == 0
        )

    async def until_at_rest(self, timeout_s: float = 5.0) -> None:
        """Wait until nothing is held for any request."""
        await until(self.at_rest, timeout_s)


def value_of(metric: Any) -> float:
    """Return the value of a metric without labels."""
    return float(next(iter(metric.collect())).samples[0].value)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def request_for(prompt: Sequence[int] = (5, 6, 7), **fields: Any) -> GenerateRequest:
    """Return a request for ready token ids; greedy, 8 tokens."""
    fields = {"max_tokens": 8, "sampling": SamplingParams(temperature=0, seed=1), **fields}
    return GenerateRequest(token_ids=TokenIds(ids=prompt), **fields)
