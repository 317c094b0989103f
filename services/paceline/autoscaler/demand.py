"""The load that replicas asked for now will meet: one series, forecast. Pure.

A request does not meet the average load but that of its own moment, and a burst holds more
requests than a lull: the goal is a share of requests, so lately seen loads count as often as
requests met them. Where the load rises, the regression sees further.
"""

from __future__ import annotations

from paceline.autoscaler.forecast import RecentQuantileForecaster, RegressionForecaster

QUANTILE = 0.9
"""Of the load. The sizes made of it have their own share for chance (capacity.py), so the two
together miss less than a tenth of that."""
_MOST_VARIATION = 1.25
"""A load that is on for less than two fifths of the time varies more; by how much depends on
single bursts."""


class Demand:
    """One kind of load, such as seconds of prompt work per second."""

    def __init__(self) -> None:
        self._recent = RecentQuantileForecaster()
        self._trend = RegressionForecaster()
        self.now = 0.0
        """The last value seen."""

    def note(self, at_s: float, value: float, requests_per_s: float) -> None:
        """Take what the load is."""
        self.now = value
        self._recent.observe(at_s, value, requests_per_s)
        self._trend.observe(at_s, value)

    def expected(self, horizon_s: float) -> float:
        """Return what the load does not exceed, for all but a tenth of requests."""
        return max(
            self._recent.predict(horizon_s, QUANTILE), self._trend.predict(horizon_s, QUANTILE)
        )

    @property
    def burst_ratio(self) -> float:
        """How much more than a window's mean may come within it, 1 to 2.25.

        What happens within a window is not seen. A load is taken to vary there as it varies
        between windows: by its coefficient of variation.
        """
        return 1.0 + min(_MOST_VARIATION, self._recent.variation())
