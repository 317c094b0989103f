"""`python -m paceline.gateway` as a process: start, readiness, drain, and why it does not start."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from paceline.domain.member import Member, Role
from paceline.process.membership import Membership
from paceline.v1 import inference_pb2_grpc
from tests.redis_server import RedisServer
from tests.refusal import refusal_of
from tests.unit.gateway.scripted_worker import ScriptedWorker, Stage, answering
from tests.unit.gateway.stack import DEMO, request_for
from tests.unit.gateway.test_http import Site
from tests.waiting import until


class GatewayProcess:
    """One gateway with its log."""

    def __init__(self, directory: Path, redis_url: str, *flags: str) -> None:
        self._log = directory / "gateway.log"
        command = [sys.executable, "-m", "paceline.gateway", "--redis-url", redis_url]
        command += ["--fleet", "process", "--model", str(DEMO), "--grpc-port", "0"]
        command += ["--http-port", "0", "--member-id", "gateway", *flags]
        with open(self._log, "wb") as log:
            env = {**os.environ, "PACELINE_EXIT_WITH_PARENT": "1"}
            self.process = subprocess.Popen(command, stderr=log, env=env)

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines of an event."""
        texts = self._log.read_text().splitlines()
        return [line for line in map(json.loads, texts) if line["event"] == event]

    async def addresses(self) -> tuple[str, Site]:
        """Wait until it listens."""
        (line, *_) = await until(lambda: self.lines("listening"), 20)
        return line["grpc"], Site(line["http"])

    async def ended(self) -> int:
        """Wait for its end; return the exit code."""
        return await asyncio.to_thread(self.process.wait, 20)


@asynccontextmanager
async def gateway(directory: Path, redis_url: str, *flags: str) -> AsyncIterator[GatewayProcess]:
    process = GatewayProcess(directory, redis_url, *flags)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()


@pytest.fixture
async def running(
    redis_server: RedisServer, tmp_path: Path
) -> AsyncIterator[tuple[GatewayProcess, str, Site]]:
    """Run a gateway that is ready, with one slow worker; yield it with its addresses."""
    url, stage = redis_server.url, Stage()
    stage.decode_default = answering(pause_s=0.05)
    async with gateway(tmp_path, url) as process, ScriptedWorker(stage, url, "process"):
        address, site = await process.addresses()

        async def is_ready() -> bool:
            return (await site.get("/readyz")).status == 200

        await until(is_ready)
        yield process, address, site


async def test_a_gateway_tells_of_itself_and_of_redis(
    redis_server: RedisServer, running: tuple[GatewayProcess, str, Site]
) -> None:
    _, address, site = running
    membership = Membership(redis_server.url, "process")

    async def members() -> list[Member]:
        return [m for m in await membership.members() if m.role is Role.GATEWAY]

    (member,) = await until(members)
    assert (member.id, member.address) == ("gateway", address)
    assert member.metrics_address == f"127.0.0.1:{site.port}"
    await membership.close()
    async with grpc.aio.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

        async def is_serving() -> bool:
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        await until(is_serving)
        for is_up in (False, True):
            redis_server.start() if is_up else redis_server.kill()

            async def is_told(value: float = float(is_up)) -> bool:
                return await site.metric("paceline_redis_up") == value

            await until(is_told)
            assert len([r async for r in stub.Generate(request_for(max_tokens=2))]) == 2


async def test_a_gateway_that_is_told_to_stop_ends_its_streams_first(
    redis_server: RedisServer, running: tuple[GatewayProcess, str, Site]
) -> None:
    process, address, site = running
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(request_for(max_tokens=30), timeout=20)
        await call.read()
        process.process.send_signal(signal.SIGTERM)

        async def is_draining() -> bool:
            return (await site.get("/readyz")).text == "draining\n"

        await until(is_draining)

        async def is_told() -> bool:
            return '"is_draining":true' in (await site.get("/status")).text

        await until(is_told)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in stub.Generate(request_for(), timeout=5):
                pass
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        num_messages = 1
        while (await call.read()) is not grpc.aio.EOF:
            num_messages += 1
        assert num_messages == 30
    assert await process.ended() == 0
    membership = Membership(redis_server.url, "process")
    assert [m.role for m in await membership.members()] == [Role.DECODE]
    await membership.close()


async def test_a_gateway_that_ends_tells_of_parked_requests_and_keeps_none(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    membership = Membership(redis_server.url, "process")
    autoscaler = Member("autoscaler", Role.AUTOSCALER, "127.0.0.1:1", 0, "test")
    await membership.register(autoscaler)
    async with gateway(tmp_path, redis_server.url, "--drain-grace-s", "15") as process:
        address, _ = await process.addresses()
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            call = stub.Generate(request_for(), timeout=30)

            async def is_announced() -> bool:
                await membership.register(autoscaler)
                found = [m for m in await membership.members() if m.role is Role.GATEWAY]
                return [m.load.num_waiting for m in found] == [1]

            await until(is_announced, 20)
            process.process.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call.read()
        refusal = refusal_of(error.value)
        assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "gateway-stopping")
        assert await process.ended() == 0
    await membership.close()


def broken_model(directory: Path) -> Path:
    path = directory / "model"
    path.mkdir()
    (path / "tokenizer.json").write_text("{}")
    return path


def broken_template(directory: Path) -> Path:
    path = directory / "model"
    path.mkdir()
    shutil.copy(DEMO / "tokenizer.json", path)
    (path / "chat_template.jinja").write_text("{% for %}")
    return path


async def test_it_says_why_it_does_not_start(redis: RedisServer, tmp_path: Path) -> None:
    bad_keys = tmp_path / "keys.json"
    bad_keys.write_text('{"secret": {"tenant": "a", "models": "demo"}}')
    cases = {
        "no-model": (["--model", str(tmp_path / "none")], "none"),
        "bad-tokenizer": (["--model", str(broken_model(tmp_path))], "tokenizer.json"),
        "keys": (["--api-keys", str(bad_keys)], "models is not a list"),
        "exposed": (["--host", "0.0.0.0"], "api_keys or allow_anonymous"),
        "policy": (["--routing-policy", "luck"], "known are cost"),
    }
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "t").mkdir()
    cases["template"] = (["--model", str(broken_template(tmp_path / "t"))], "chat template")
    broken_model(tmp_path)

    async def run(name: str) -> None:
        flags, words = cases[name]
        directory = tmp_path / f"case-{name}"
        directory.mkdir()
        async with gateway(directory, redis.url, *flags) as process:
            assert await process.ended() == 1, name
            (line,) = process.lines("start-failed")
            assert words in line["error"], name
            assert "secret" not in line["error"]

    for names in (["no-model", "bad-tokenizer", "template"], ["keys", "exposed", "policy"]):
        await asyncio.gather(*map(run, names))
