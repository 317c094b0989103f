"""Series of the latest versions of each drafter; drafts change for as long as a process lives."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Counter

from paceline.process.metrics.labelled import Labelled
from paceline.process.metrics.speculation import MAX_VERSIONS


class RecentVersions:
    """Removes the series of versions that were not seen for longest."""

    def __init__(self, counters: Sequence[Labelled[Counter]]) -> None:
        """Keep `counters`, all labelled by drafter and version, to few versions per drafter."""
        self._counters = counters
        self._versions: dict[str, list[str]] = {}
        """By drafter, those that have series; the one seen last at the end."""

    def note(self, drafter: str, version: str) -> None:
        """Make room for a version that is about to be counted."""
        versions = self._versions.setdefault(drafter, [])
        if version in versions:
            versions.remove(version)
        versions.append(version)
        if len(versions) > MAX_VERSIONS:
            oldest = versions.pop(0)
            for counter in self._counters:
                counter.remove(drafter, oldest)
