"""Observations from a file: JSON lines as the journal writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from paceline.autoscaler.problems import problem
from paceline.autoscaler.record import observation_from_json
from paceline.autoscaler.values import Observation, Replica
from paceline.domain.member import Role


def read_observations(path: Path) -> Iterator[Observation]:
    """Yield the observations of a file in order; lines without one are passed over.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not what the journal writes, or time goes back; names the line.
    """
    carry: dict[Role, Replica | None] = {}
    last_s = float("-inf")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                data = json.loads(line)
                if "observation" not in data:
                    continue
                observation = observation_from_json(data["observation"], carry)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{path}:{number}: no line of a journal: {error}") from error
            if observation.at_s < last_s:
                raise ValueError(f"{path}:{number}: time goes back")
            last_s = observation.at_s
            carry = {role: pool.replica for role, pool in observation.pools.items()}
            yield observation


class ReplaySource:
    """A `MetricSource` that returns what was recorded, one observation per read.

    The recorded time is kept. At the end the last observation comes again, with a problem that
    says so.
    """

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            OSError, ValueError: see `read_observations`; also without any observation.
        """
        self._observations = list(read_observations(path))
        if not self._observations:
            raise ValueError(f"{path}: no observation in it")
        self._next = 0

    @property
    def is_over(self) -> bool:
        """Whether every observation was returned."""
        return self._next >= len(self._observations)

    async def read(self, now_s: float) -> Observation:
        """Return the next observation."""
        if self.is_over:
            line = problem("replay-ended", "the file has no more observations")
            last = self._observations[-1]
            return replace(last, at_s=max(now_s, last.at_s), problems=(*last.problems, line))
        self._next += 1
        return self._observations[self._next - 1]
