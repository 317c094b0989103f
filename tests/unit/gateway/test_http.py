"""The HTTP port: metrics, health, readiness, status."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from paceline.domain.member import Load, Role
from paceline.gateway.http import create_app
from paceline.process.http_server import HttpServer
from tests.redis_server import RedisServer
from tests.unit.gateway.scripted_worker import CARD, breaking, hang
from tests.unit.gateway.stack import Stack, request_for
from tests.waiting import until


class Page:
    """What a GET (or another method) returns."""

    def __init__(self, url: str, method: str = "GET") -> None:
        request = urllib.request.Request(url, method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                self.status: int = response.status
                self.type: str = response.headers["content-type"]
                self.text: str = response.read().decode()
        except urllib.error.HTTPError as error:
            self.status, self.type = error.code, error.headers["content-type"]
            self.text = error.read().decode()
            error.close()


class Site:
    """The pages of one gateway."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.is_draining = False

    async def get(self, path: str, method: str = "GET") -> Page:
        return await asyncio.to_thread(Page, f"http://127.0.0.1:{self.port}{path}", method)

    async def metric(self, name: str, **labels: str) -> float:
        page = await self.get("/metrics")
        return sum(
            sample.value
            for family in text_string_to_metric_families(page.text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@asynccontextmanager
async def serving(stack: Stack) -> AsyncIterator[Site]:
    site = Site(0)
    app = create_app(
        stack.fleet, stack.pipeline, stack.metrics, lambda: site.is_draining, stack.settings
    )
    server = HttpServer(app, "127.0.0.1", 0)
    site.port = server.port
    task = asyncio.create_task(server.run())

    async def is_up() -> bool:
        try:
            return (await site.get("/healthz")).status == 200
        except OSError:
            return False

    await until(is_up)
    try:
        yield site
    finally:
        await server.close(task)
        assert task.done()


async def test_health_and_readiness(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack, serving(stack) as site:
        assert (await site.get("/healthz")).text == "ok\n"
        page = await site.get("/readyz")
        assert (page.status, page.text) == (503, "no decode worker is ready\n")
        await stack.add(Role.PREFILL)
        assert (await site.get("/readyz")).status == 503
        await stack.add()
        page = await site.get("/readyz")
        assert (page.status, page.text) == (200, "ready\n")
        site.is_draining = True
        page = await site.get("/readyz")
        assert (page.status, page.text) == (503, "draining\n")
        assert (await site.get("/healthz")).status == 200


async def test_a_fleet_that_can_be_woken_is_ready(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack, serving(stack) as site:
        assert (await site.get("/readyz")).status == 503
        await stack.add(Role.AUTOSCALER)
        assert (await site.get("/readyz")).status == 200


async def test_prometheus_is_told_whom_to_scrape_also_while_redis_is_away(
    redis_server: RedisServer,
) -> None:
    async with Stack(redis_server.url) as stack, serving(stack) as site:
        await stack.add(Role.KVSTORE, worker_id="kv", metrics_address="127.0.0.1:3")
        await stack.add(worker_id="d", metrics_address="127.0.0.1:2")
        await stack.add(worker_id="silent")
        labels = {"fleet": stack.name, "model": "demo"}
        wanted = [
            {
                "targets": ["127.0.0.1:2"],
                "labels": {"role": "decode", "member": "d", **labels},
            },
            {
                "targets": ["127.0.0.1:3"],
                "labels": {"role": "kvstore", "member": "kv", **labels},
            },
        ]
        page = await site.get("/metrics/targets")
        assert (page.status, page.type) == (200, "application/json")
        assert json.loads(page.text) == wanted
        redis_server.kill()
        await until(lambda: not stack.fleet.has_redis)
        assert json.loads((await site.get("/metrics/targets")).text) == wanted


async def test_a_gateway_that_knows_nobody_yet_does_not_say_that_there_is_nobody(
    redis_server: RedisServer,
) -> None:
    redis_server.kill()
    async with Stack(redis_server.url) as stack, serving(stack) as site:
        assert (await site.get("/metrics/targets")).status == 503
        redis_server.start()
        await until(lambda: stack.fleet.has_redis)
        page = await site.get("/metrics/targets")
        assert (page.status, json.loads(page.text)) == (200, [])


async def test_metrics_count_what_happened(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack, serving(stack) as site:
        assert (await site.get("/metrics")).type.startswith("text/plain")
        await stack.add()
        stack.stage.decode("r", breaking(1, hang))
        call = stack.call(request_for(request_id="r"))
        await call.read()
        await stack.generate(request_for())
        await stack.refused(request_for(n=99))
        assert await site.metric("paceline_requests_running") == 1
        call.cancel()
        await stack.until_at_rest()
        assert await site.metric("paceline_requests_running") == 0
        assert await site.metric("paceline_redis_up") == 1
        assert await site.metric("paceline_prompt_tokens_total") == 6
        assert await site.metric("paceline_completion_tokens_total") == 9
        assert await site.metric("paceline_ttft_seconds_count") == 2
        assert await site.metric("paceline_itl_seconds_count") == 7
        assert await site.metric("paceline_e2e_seconds_count") == 1
        assert await site.metric("paceline_routing_decisions_total", kind="decode-only") == 2
        name = "paceline_rpc_requests_total"
        for code in ("OK", "INVALID_ARGUMENT", "CANCELLED"):
            assert await site.metric(name, code=code) == 1


async def test_the_status_shows_the_fleet(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack, serving(stack) as site:
        empty = json.loads((await site.get("/status")).text)
        assert (empty["model"], empty["members"]) == (None, [])
        await stack.add(Role.KVSTORE, worker_id="kv", node_id="kv")
        await stack.add(worker_id="d", load=Load(num_running=3, free_blocks=7))
        stack.stage.decode("r", breaking(1, hang))
        call = stack.call(request_for(request_id="r"))
        await call.read()
        stack.fleet.suspect(stack.member(stack.workers[1]))
        page = await site.get("/status")
        assert page.type == "application/json"
        status = json.loads(page.text)
        assert status["has_redis"] is True
        assert status["requests"] == {"running": 1, "parked": 0, "finished": 0, "failed": 0}
        assert status["model"]["name"] == "demo"
        assert status["model"]["kv_root"] == CARD.kv_root.hex()
        decode, node = status["members"]
        assert (decode["id"], decode["role"], decode["is_suspect"]) == ("d", "decode", True)
        assert (decode["load"]["num_running"], decode["load"]["free_blocks"]) == (3, 7)
        assert (node["id"], node["role"], node["is_draining"]) == ("kv", "kvstore", False)
        assert decode["epoch"] > 0
        call.cancel()


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "GET", 404),
        ("/metrics/../status", "GET", 404),
        ("/status", "POST", 405),
        ("/readyz", "DELETE", 405),
        ("/healthz", "HEAD", 200),
    ],
)
async def test_there_is_nothing_else(
    redis: RedisServer, path: str, method: str, status: int
) -> None:
    async with Stack(redis.url) as stack, serving(stack) as site:
        assert (await site.get(path, method)).status == status


def test_a_taken_port_is_told() -> None:
    async def app(scope: object, receive: object, send: object) -> None: ...

    server = HttpServer(app, "127.0.0.1", 0)  # type: ignore[arg-type]
    try:
        with pytest.raises(OSError, match="is it taken"):
            HttpServer(app, "127.0.0.1", server.port)  # type: ignore[arg-type]
    finally:
        server._socket.close()
