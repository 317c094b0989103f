"""PromQL of panels, built from few forms so that every query obeys the variables.

Series carry the labels of their target: fleet, model, role, member. Rates are taken over
`$__rate_interval`, ratios are of rates and have no value while nothing happens, so that no panel
shows an average over the life of a process.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of a panel and what its series are called."""

    expr: str
    legend: str = ""


class Scope:
    """Queries about the series that some matchers choose."""

    def __init__(self, matchers: str) -> None:
        self._matchers = matchers

    def series(self, metric: str, *matchers: str) -> str:
        """Return the selector of a metric; further matchers like `result="good"`."""
        return f"{metric}{{{', '.join([self._matchers, *matchers])}}}"

    def sum(self, metric: str, *matchers: str, by: str = "") -> str:
        """Return the sum of a gauge."""
        return _over("sum", self.series(metric, *matchers), by)

    def max(self, metric: str, *matchers: str, by: str = "") -> str:
        """Return the largest of a gauge."""
        return _over("max", self.series(metric, *matchers), by)

    def min(self, metric: str, *matchers: str, by: str = "") -> str:
        """Return the smallest of a gauge."""
        return _over("min", self.series(metric, *matchers), by)

    def avg(self, metric: str, *matchers: str, by: str = "") -> str:
        """Return the mean of a gauge over its series, not over time."""
        return _over("avg", self.series(metric, *matchers), by)

    def rate(self, metric: str, *matchers: str, by: str = "") -> str:
        """Return how fast a counter grows, per second."""
        return _over("sum", f"rate({self.series(metric, *matchers)}[$__rate_interval])", by)

    def increase(self, metric: str, *matchers: str, by: str = "", over: str = "$__range") -> str:
        """Return how much a counter grew over a time, by default what the dashboard shows."""
        return _over("sum", f"increase({self.series(metric, *matchers)}[{over}])", by)

    def quantile(self, quantile: float, histogram: str, *matchers: str, by: str = "") -> str:
        """Return a quantile of the values observed lately."""
        groups = f"le, {by}" if by else "le"
        return f"histogram_quantile({quantile}, {self.buckets(histogram, *matchers, by=groups)})"

    def buckets(self, histogram: str, *matchers: str, by: str = "le") -> str:
        """Return how fast the buckets of a histogram grow."""
        return self.rate(f"{histogram}_bucket", *matchers, by=by)

    def within(self, histogram: str, bound: str) -> str:
        """Return the share of values up to `bound`, which has to be the edge of a bucket."""
        return ratio(
            self.rate(f"{histogram}_bucket", f'le="{bound}"'), self.rate(f"{histogram}_count")
        )


def ratio(part: str, whole: str) -> str:
    """Return part / whole; nothing while the whole is 0, instead of NaN."""
    return f"{part} / ({whole} > 0)"


def _over(function: str, expr: str, by: str) -> str:
    return f"{function} by ({by}) ({expr})" if by else f"{function}({expr})"


# Nodes and others that serve no model have an empty label and belong to whichever is chosen.
_SHARED = 'fleet=~"$fleet", model=~"$model|"'

FLEET = Scope(_SHARED)
"""What belongs to no single process: requests, routing, training, scaling."""

CHOSEN = Scope(f'{_SHARED}, role=~"$role", member=~"$member"')
"""What each process tells about itself; the variables role and member choose among them."""
