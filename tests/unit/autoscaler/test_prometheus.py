"""What a real Prometheus that scrapes real pages is read as."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from paceline.autoscaler.sources.prometheus import PrometheusRules, PrometheusSource, Signals
from paceline.autoscaler.sources.prometheus_api import PrometheusApi
from paceline.autoscaler.values import Traffic
from paceline.domain.member import Role
from tests.prometheus_server import PrometheusServer, needs_prometheus
from tests.unit.autoscaler.exporter import GatewayPage, WorkerPage

pytestmark = needs_prometheus

WINDOW_S = 4.0
TIMEOUT_S = 20.0


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[PrometheusServer]:
    server = PrometheusServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def gateway() -> Iterator[GatewayPage]:
    page = GatewayPage()
    yield page
    page.page.close()


@pytest.fixture
def worker() -> Iterator[WorkerPage]:
    page = WorkerPage("decode")
    yield page
    page.page.close()


class Reader:
    """Reads one Prometheus, by a clock of its own."""

    def __init__(self, source: PrometheusSource) -> None:
        self._source = source
        self.signals = Signals()

    async def until(
        self,
        condition: Callable[[Signals], bool],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Signals:
        """Read until a condition holds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + TIMEOUT_S
        while True:
            meanwhile()
            self.signals = await self._source.read(loop.time())
            if condition(self.signals):
                return self.signals
            assert loop.time() < end, self.signals
            await asyncio.sleep(0.05)


@asynccontextmanager
async def reading(
    url: str, *, window_s: float = WINDOW_S, stale_s: float = 3.0, timeout_s: float = 5.0
) -> AsyncIterator[Reader]:
    api = PrometheusApi(url, timeout_s)
    rules = PrometheusRules(window_s=window_s, stale_s=stale_s, ttft_s=0.1, itl_s=0.2)
    try:
        yield Reader(PrometheusSource(api, rules))
    finally:
        await api.close()


def is_sound(signals: Signals) -> bool:
    return not signals.problems and Role.DECODE in signals.busy_ratio


def has_traffic(signals: Signals) -> bool:
    return signals.traffic is not None and signals.traffic.requests_per_s > 0


async def test_a_fleet_without_traffic_is_known_to_have_none(
    prometheus: PrometheusServer, gateway: GatewayPage, worker: WorkerPage
) -> None:
    prometheus.scrape([gateway.target, worker.target])
    async with reading(prometheus.url) as reader:
        signals = await reader.until(is_sound)
    assert signals.traffic == Traffic(WINDOW_S, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert signals.latency.ttft_p95_s is None
    assert signals.latency.itl_within_ratio is None
    assert signals.busy_ratio == {Role.DECODE: 0.0}
    assert signals.num_scraped == {Role.GATEWAY: 1, Role.PREFILL: 0, Role.DECODE: 1}
    assert signals.age_s is not None and signals.age_s < 3.0


async def test_traffic_and_latency_are_what_was_served(
    prometheus: PrometheusServer, gateway: GatewayPage, worker: WorkerPage
) -> None:
    prometheus.scrape([gateway.target, worker.target])
    async with reading(prometheus.url) as reader:
        await reader.until(is_sound)
        rounds = []

        def serve() -> None:
            rounds.append(None)
            for ttft_s in (0.05, 0.05, 0.05, 1.5):
                gateway.serve(ttft_s=ttft_s)
                worker.draft(rounds=4, drafted=12, emitted=10)
                worker.step.observe(0.02)

        def has_settled(signals: Signals) -> bool:
            is_busy = signals.busy_ratio.get(Role.DECODE, 0) > 0
            # Pages are scraped at different times: so many that one more or less is nothing.
            return has_traffic(signals) and is_busy and len(rounds) > 60

        signals = await reader.until(has_settled, serve)
    traffic, latency = signals.traffic, signals.latency
    assert traffic is not None
    assert traffic.prompt_tokens == pytest.approx(50)
    assert 10 < traffic.prompt_tokens_p95 <= 100
    assert traffic.output_tokens == pytest.approx(20)
    assert traffic.cached_ratio == pytest.approx(0.2)
    # Of 20 tokens 10 came by 4 passes with 12 drafted tokens, 10 by a pass each.
    assert traffic.emitted_per_step == pytest.approx(20 / 14, rel=0.25)
    assert traffic.nodes_per_step == pytest.approx(12 / 14, rel=0.25)
    assert latency.ttft_within_ratio == pytest.approx(0.75, abs=0.15)
    assert latency.ttft_p95_s is not None and 1.0 < latency.ttft_p95_s <= 2.0
    assert latency.itl_within_ratio == pytest.approx(1.0)
    assert latency.itl_p95_s is not None and 0.1 < latency.itl_p95_s <= 0.2


async def test_the_usual_size_of_requests_outlives_a_quiet_window(
    prometheus: PrometheusServer, gateway: GatewayPage, worker: WorkerPage
) -> None:
    prometheus.scrape([gateway.target, worker.target])
    async with reading(prometheus.url) as reader:
        await reader.until(has_traffic, gateway.serve)
        signals = await reader.until(lambda s: not has_traffic(s))
    assert signals.traffic is not None
    assert signals.traffic.requests_per_s == 0
    assert signals.traffic.prompt_tokens == pytest.approx(50)
    assert signals.traffic.output_tokens == pytest.approx(20)


async def test_arrivals_that_nobody_measured_are_no_traffic_of_size_zero(
    prometheus: PrometheusServer, gateway: GatewayPage, worker: WorkerPage
) -> None:
    prometheus.scrape([gateway.target, worker.target])
    async with reading(prometheus.url) as reader:
        await reader.until(is_sound)
        signals = await reader.until(lambda s: s.traffic is None, gateway.received.inc)
    (line,) = signals.problems
    assert line.startswith("prometheus-missing: ")
    assert "output_tokens" in line


async def test_two_gateways_are_added_up(
    prometheus: PrometheusServer, gateway: GatewayPage, worker: WorkerPage
) -> None:
    other = GatewayPage()
    prometheus.scrape([gateway.target, other.target, worker.target])
    try:
        async with reading(prometheus.url) as reader:
            await reader.until(lambda s: s.num_scraped.get(Role.GATEWAY) == 2)

            def serve() -> None:
                gateway.serve(prompt=50)
                other.serve(prompt=90)

            await reader.until(
                lambda s: s.traffic is not None and 50 < s.traffic.prompt_tokens < 90, serve
            )
            prometheus.scrape([gateway.target, worker.target])
            await reader.until(lambda s: s.num_scraped.get(Role.GATEWAY) == 1)
    finally:
        other.page.close()


async def test_a_prometheus_that_scrapes_nobody_misses_data(prometheus: PrometheusServer) -> None:
    async with reading(prometheus.url) as reader:
        signals = await reader.until(lambda s: bool(s.problems))
    assert signals.traffic is None
    assert signals.age_s is None
    (line,) = signals.problems
    assert line.startswith("prometheus-missing: sample_age_s, requests_per_s")


async def test_pages_that_stop_answering_make_data_missing_or_stale(
    prometheus: PrometheusServer, gateway: GatewayPage, worker: WorkerPage
) -> None:
    prometheus.scrape([gateway.target, worker.target])
    async with reading(prometheus.url) as reader:
        await reader.until(is_sound)
        gateway.page.close()
        signals = await reader.until(lambda s: bool(s.problems))
        assert signals.traffic is None or signals.age_s is None


async def test_a_dead_prometheus_is_unreachable_and_comes_back(
    prometheus: PrometheusServer, gateway: GatewayPage, worker: WorkerPage
) -> None:
    prometheus.scrape([gateway.target, worker.target])
    async with reading(prometheus.url) as reader:
        await reader.until(is_sound)
        prometheus.kill()
        signals = await reader.until(lambda s: bool(s.problems))
        assert signals.traffic is None
        assert [line.partition(":")[0] for line in signals.problems] == ["prometheus-unreachable"]
        assert "all queries" in signals.problems[0]
        prometheus.start()
        await reader.until(is_sound)


async def test_a_prometheus_that_hangs_costs_one_deadline(prometheus: PrometheusServer) -> None:
    async with reading(prometheus.url, timeout_s=0.5) as reader:
        prometheus.pause()
        try:
            begun_s = asyncio.get_running_loop().time()
            signals = await reader.until(lambda s: bool(s.problems))
            took_s = asyncio.get_running_loop().time() - begun_s
        finally:
            prometheus.resume()
    assert signals.problems == ("prometheus-timeout: all queries: no answer within 0.5 s",)
    # Seventeen queries, one after the other, would take more.
    assert took_s < 5.0


async def test_samples_that_stand_still_are_stale(
    prometheus: PrometheusServer, gateway: GatewayPage, worker: WorkerPage
) -> None:
    prometheus.scrape([gateway.target, worker.target])
    async with reading(prometheus.url, stale_s=2.0) as reader:
        await reader.until(is_sound)
        # A target that is taken away is marked; one of a server that was away is not.
        prometheus.kill()
        prometheus.scrape([])
        prometheus.start()
        signals = await reader.until(lambda s: s.age_s is not None and s.age_s > 2.0)
    assert any(
        line.startswith("prometheus-stale: the newest sample is") for line in signals.problems
    )
