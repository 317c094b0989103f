"""Every question that the autoscaler asks Prometheus, as PromQL. Pure text.

Means of tokens fall back to the last hour while nobody was served within the window: what a
request is like outlives a quiet minute. A query may come back empty only where it says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.autoscaler.values import POOLS
from paceline.domain.member import Role

SHAPE_WINDOW = "1h"
"""How far back a request's usual size is looked for when the window has none."""


@dataclass(frozen=True, slots=True)
class Query:
    """One instant query."""

    name: str
    promql: str
    is_buckets: bool = False
    """The answer is a histogram's buckets, by `le`; else one number."""
    may_be_absent: bool = False
    """No answer means that nobody was measured, not that data is missing."""


def scraped(role: Role) -> str:
    """Return the name of the query that counts the processes of a role with fresh samples."""
    return f"scraped_{role.value}"


def busy(role: Role) -> str:
    """Return the name of the query for the share of time that a pool spends in steps."""
    return f"busy_ratio_{role.value}"


def queries(window_s: float, stale_s: float, selector: str = "") -> tuple[Query, ...]:
    """Return all queries.

    `selector` is put into every selection of series (`namespace="llm"`), for a Prometheus that
    watches more than one fleet. Samples older than `stale_s` do not count.
    """
    ask = _Promql(f"{max(1, round(window_s))}s", f"{stale_s:g}", selector)
    return (
        Query("sample_age_s", ask.age(Role.GATEWAY)),
        Query("requests_per_s", ask.rate("requests_received_total")),
        Query("prompt_tokens", ask.mean("request_prompt_tokens"), may_be_absent=True),
        Query("prompt_tokens_p95", ask.p95("request_prompt_tokens"), may_be_absent=True),
        Query("output_tokens", ask.mean("request_output_tokens"), may_be_absent=True),
        Query(
            "cached_ratio",
            ask.ratio("cached_prompt_tokens_total", "prompt_tokens_total"),
            may_be_absent=True,
        ),
        Query("completion_tokens_per_s", ask.rate("completion_tokens_total")),
        # Series of drafts begin with the first draft.
        Query("draft_rounds_per_s", ask.rate_or_zero("speculation_rounds_total")),
        Query("draft_emitted_per_s", ask.rate_or_zero("speculation_emitted_tokens_total")),
        Query("drafted_tokens_per_s", ask.rate_or_zero("speculation_drafted_tokens_total")),
        Query("ttft_buckets", ask.buckets("ttft_seconds"), is_buckets=True),
        Query("itl_buckets", ask.buckets("itl_seconds"), is_buckets=True),
        *(Query(busy(role), ask.busy(role), may_be_absent=True) for role in POOLS),
        *(Query(scraped(role), ask.count(role)) for role in (Role.GATEWAY, *POOLS)),
    )


@dataclass(frozen=True, slots=True)
class _Promql:
    """Writes PromQL for one window and selector."""

    window: str
    stale_s: str
    selector: str

    def rate(self, name: str) -> str:
        return f"sum(rate({self._series(name)}[{self.window}]))"

    def rate_or_zero(self, name: str) -> str:
        return f"({self.rate(name)} or vector(0))"

    def ratio(self, part: str, whole: str) -> str:
        return (
            f"{self._ratio(part, whole, self.window)} or {self._ratio(part, whole, SHAPE_WINDOW)}"
        )

    def mean(self, histogram: str) -> str:
        return self.ratio(f"{histogram}_sum", f"{histogram}_count")

    def p95(self, histogram: str) -> str:
        return f"{self._p95(histogram, self.window)} or {self._p95(histogram, SHAPE_WINDOW)}"

    def buckets(self, histogram: str) -> str:
        return f"sum by (le) (rate({self._series(histogram + '_bucket')}[{self.window}]))"

    def busy(self, role: Role) -> str:
        steps = f"rate({self._series('engine_step_seconds_sum')}[{self.window}])"
        # The role is a label of the process or of the scrape; build_info has it either way.
        those = f"max by (job, instance) ({self._processes(role)})"
        return f"avg({steps} * on (job, instance) group_left () {those})"

    def age(self, role: Role) -> str:
        return f"time() - max(timestamp({self._processes(role)}))"

    def count(self, role: Role) -> str:
        ages = f"time() - timestamp({self._processes(role)})"
        return f"(count(({ages}) < {self.stale_s}) or vector(0))"

    def _ratio(self, part: str, whole: str, window: str) -> str:
        parts = f"sum(rate({self._series(part)}[{window}]))"
        wholes = f"sum(rate({self._series(whole)}[{window}]))"
        return f"({parts} / ({wholes} > 0))"

    def _p95(self, histogram: str, window: str) -> str:
        buckets = f"sum by (le) (rate({self._series(histogram + '_bucket')}[{window}]))"
        count = f"sum(rate({self._series(histogram + '_count')}[{window}]))"
        return f"(histogram_quantile(0.95, {buckets}) and on () ({count} > 0))"

    def _processes(self, role: Role) -> str:
        label = "service" if role is Role.GATEWAY else "role"
        return self._series("build_info", f'{label}="{role.value}"')

    def _series(self, name: str, *labels: str) -> str:
        chosen = ",".join(filter(None, (self.selector, *labels)))
        return f"paceline_{name}{{{chosen}}}" if chosen else f"paceline_{name}"
