"""Traffic, latency and busy time of the fleet, from the metrics that Prometheus has.

All queries run at once, each under its own deadline. What is missing, stale, not finite or
negative becomes a line in `Signals.problems`. No traffic is not missing data: then rates are 0.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from paceline.autoscaler.problems import problem
from paceline.autoscaler.sources.histogram import Buckets
from paceline.autoscaler.sources.prometheus_api import PrometheusApi, QueryError, Sample
from paceline.autoscaler.sources.queries import Query, busy, queries, scraped
from paceline.autoscaler.values import POOLS, Latency, Traffic
from paceline.domain.member import Role

_MAX_NAMES = 4
"""Queries that a problem names before it counts them."""


@dataclass(frozen=True, slots=True)
class PrometheusRules:
    """What is asked, and what is believed."""

    window_s: float
    stale_s: float
    """Samples older than this are not used."""
    ttft_s: float
    """Target that `ttft_within_ratio` is about."""
    itl_s: float
    selector: str = ""


@dataclass(frozen=True, slots=True)
class Signals:
    """What Prometheus knows."""

    traffic: Traffic | None = None
    latency: Latency = field(default_factory=Latency)
    busy_ratio: Mapping[Role, float] = field(default_factory=dict)
    num_scraped: Mapping[Role, int] = field(default_factory=dict)
    """Processes with fresh samples; roles that could not be counted are not in it."""
    age_s: float | None = None
    """Age of the newest sample of a gateway."""
    problems: tuple[str, ...] = ()


class PrometheusSource:
    """Reads `Signals`."""

    def __init__(self, api: PrometheusApi, rules: PrometheusRules) -> None:
        self._api = api
        self._rules = rules
        self._queries = queries(rules.window_s, rules.stale_s, rules.selector)
        self._clock = AnswerClock()

    async def read(self, now_s: float) -> Signals:
        """Ask everything; never raises for what Prometheus does."""
        answers = await asyncio.gather(*map(self._ask, self._queries))
        notes = Notes()
        numbers: dict[str, float] = {}
        buckets: dict[str, Buckets] = {}
        for query, answer in zip(self._queries, answers, strict=True):
            try:
                if isinstance(answer, QueryError):
                    raise answer
                if query.is_buckets:
                    buckets[query.name] = _buckets(answer)
                elif (number := _number(query, answer)) is not None:
                    numbers[query.name] = number
                if query.name == "sample_age_s" and answer:
                    numbers[query.name] += self._clock.lag_s(answer[0].at_s, now_s)
            except QueryError as error:
                notes.add(error.reason, error.text, query.name)
        return self._signals(numbers, buckets, notes)

    async def _ask(self, query: Query) -> list[Sample] | QueryError:
        try:
            return await self._api.query(query.promql)
        except QueryError as error:
            return error

    def _signals(
        self, numbers: Mapping[str, float], buckets: Mapping[str, Buckets], notes: Notes
    ) -> Signals:
        age_s = numbers.get("sample_age_s")
        if age_s is not None and age_s > self._rules.stale_s:
            notes.say("prometheus-stale", f"the newest sample is {age_s:.0f} s old")
        rules = self._rules
        ttft, itl = buckets.get("ttft_buckets"), buckets.get("itl_buckets")
        latency = Latency(
            ttft_p95_s=ttft.quantile(0.95) if ttft else None,
            itl_p95_s=itl.quantile(0.95) if itl else None,
            ttft_within_ratio=ttft.share_within(rules.ttft_s) if ttft else None,
            itl_within_ratio=itl.share_within(rules.itl_s) if itl else None,
        )
        return Signals(
            traffic=traffic_of(numbers, rules.window_s, notes),
            latency=latency,
            busy_ratio={r: min(1.0, numbers[busy(r)]) for r in POOLS if busy(r) in numbers},
            num_scraped={
                r: round(numbers[scraped(r)])
                for r in (Role.GATEWAY, *POOLS)
                if scraped(r) in numbers
            },
            age_s=age_s,
            problems=notes.lines(len(self._queries)),
        )


class Notes:
    """Collects problems: queries that failed alike share a line."""

    def __init__(self) -> None:
        self._names: defaultdict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, reason: str, text: str, name: str) -> None:
        """Note the failure of a query."""
        self._names[reason, text].append(name)

    def say(self, reason: str, text: str) -> None:
        """Note what concerns no single query."""
        self._names[reason, text] += []

    def lines(self, num_queries: int) -> tuple[str, ...]:
        """Return the problems."""
        return tuple(
            problem(reason, f"{_listed(names, num_queries)}{text}")
            for (reason, text), names in self._names.items()
        )


class AnswerClock:
    """Finds out that answers are old ones: from a cache, or of a Prometheus that hangs."""

    def __init__(self) -> None:
        self._answer_s: float | None = None
        self._moved_s = 0.0

    def lag_s(self, answer_s: float, now_s: float) -> float:
        """Return for how long the time of answers has been standing still."""
        if answer_s != self._answer_s:
            self._answer_s, self._moved_s = answer_s, now_s
        return now_s - self._moved_s


def traffic_of(numbers: Mapping[str, float], window_s: float, notes: Notes) -> Traffic | None:
    """Return the traffic; None if a part of it is not known."""
    try:
        requests_per_s = numbers["requests_per_s"]
        rounds, emitted = numbers["draft_rounds_per_s"], numbers["draft_emitted_per_s"]
        drafted, completed = numbers["drafted_tokens_per_s"], numbers["completion_tokens_per_s"]
    except KeyError:
        return None
    names = ("prompt_tokens", "prompt_tokens_p95", "output_tokens", "cached_ratio")
    absent = [name for name in names if name not in numbers]
    if absent and requests_per_s > 0:
        for name in absent:
            notes.add("prometheus-missing", "requests arrive, none was measured yet", name)
        return None
    # Passes without a draft emit one token; those with one are counted.
    passes = rounds + max(0.0, completed - emitted)
    return Traffic(
        window_s=window_s,
        requests_per_s=requests_per_s,
        prompt_tokens=numbers.get("prompt_tokens", 0.0),
        prompt_tokens_p95=numbers.get("prompt_tokens_p95", 0.0),
        # Cached tokens are counted a moment later than the prompt they belong to.
        cached_ratio=min(1.0, numbers.get("cached_ratio", 0.0)),
        output_tokens=numbers.get("output_tokens", 0.0),
        emitted_per_step=max(1.0, max(completed, emitted) / passes) if passes > 0 else 1.0,
        nodes_per_step=drafted / passes if passes > 0 else 0.0,
    )


def _number(query: Query, answer: list[Sample]) -> float | None:
    if not answer:
        if query.may_be_absent:
            return None
        raise QueryError("prometheus-missing", "no data")
    if len(answer) > 1:
        raise QueryError("prometheus-garbage", f"{len(answer)} numbers instead of one")
    value = answer[0].value
    if not math.isfinite(value):
        raise QueryError("prometheus-not-finite", f"is {value}")
    if value < 0:
        raise QueryError("prometheus-negative", f"is {value:g}")
    return value


def _buckets(answer: list[Sample]) -> Buckets:
    if not answer:
        raise QueryError("prometheus-missing", "no data")
    if not all(math.isfinite(sample.value) for sample in answer):
        raise QueryError("prometheus-not-finite", "a bucket is not finite")
    try:
        return Buckets.of({float(sample.labels["le"]): sample.value for sample in answer})
    except (KeyError, ValueError) as error:
        raise QueryError("prometheus-garbage", f"no histogram: {error}") from error


def _listed(names: list[str], num_queries: int) -> str:
    if not names:
        return ""
    if len(names) == num_queries:
        return "all queries: "
    rest = len(names) - _MAX_NAMES
    more = f" and {rest} more" if rest > 0 else ""
    return f"{', '.join(names[:_MAX_NAMES])}{more}: "
