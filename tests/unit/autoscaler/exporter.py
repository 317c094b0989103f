"""A fleet's metrics pages without a fleet: a gateway and workers that say what a test wants."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tests.prometheus_server import Page, Target

LATENCY = (0.01, 0.1, 0.2, 1.0, 2.0)
TOKENS = (1, 10, 100, 1000)


class GatewayPage:
    """What a gateway exports."""

    def __init__(self) -> None:
        registry = CollectorRegistry()

        def counter(name: str) -> Counter:
            return Counter(f"paceline_{name}", "x", registry=registry)

        def histogram(name: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"paceline_{name}", "x", registry=registry, buckets=buckets)

        info = Gauge("paceline_build_info", "x", ["service"], registry=registry)
        info.labels("gateway").set(1)
        self.received = counter("requests_received")
        self.prompt_tokens = counter("prompt_tokens")
        self.cached_tokens = counter("cached_prompt_tokens")
        self.completion_tokens = counter("completion_tokens")
        self.request_prompt_tokens = histogram("request_prompt_tokens", TOKENS)
        self.request_output_tokens = histogram("request_output_tokens", TOKENS)
        self.ttft = histogram("ttft_seconds", LATENCY)
        self.itl = histogram("itl_seconds", LATENCY)
        self.page = Page(registry)
        self.target = Target(self.page.address, {"role": "gateway"})

    def serve(
        self, *, prompt: int = 50, cached: int = 10, output: int = 20, ttft_s: float = 0.05
    ) -> None:
        """Count one request."""
        self.received.inc()
        self.prompt_tokens.inc(prompt)
        self.cached_tokens.inc(cached)
        self.completion_tokens.inc(output)
        self.request_prompt_tokens.observe(prompt)
        self.request_output_tokens.observe(output)
        self.ttft.observe(ttft_s)
        for _ in range(output - 1):
            self.itl.observe(0.15)


class WorkerPage:
    """What a worker exports."""

    def __init__(self, role: str) -> None:
        registry = CollectorRegistry()
        info = Gauge("paceline_build_info", "x", ["service"], registry=registry)
        info.labels("worker").set(1)
        self.step = Histogram(
            "paceline_engine_step_seconds", "x", registry=registry, buckets=LATENCY
        )
        names = ("rounds", "emitted_tokens", "drafted_tokens")
        self.rounds, self.emitted, self.drafted = (
            Counter(f"paceline_speculation_{name}", "x", ["drafter", "version"], registry=registry)
            for name in names
        )
        self.page = Page(registry)
        self.target = Target(self.page.address, {"role": role})

    def draft(self, *, rounds: int, drafted: int, emitted: int) -> None:
        """Count passes that verified drafts."""
        self.rounds.labels("model", "v1").inc(rounds)
        self.drafted.labels("model", "v1").inc(drafted)
        self.emitted.labels("model", "v1").inc(emitted)
