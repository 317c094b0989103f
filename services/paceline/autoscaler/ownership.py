"""Who sets the size of pools: what happens when it is not only this autoscaler. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from paceline.autoscaler.problems import problem
from paceline.domain.member import Role

Rule = Literal["hold", "stop", "ignore"]


@dataclass(frozen=True, slots=True)
class _Change:
    """Somebody else's."""

    before: int
    after: int
    at_s: float


class Ownership:
    """Notices sizes that nobody here asked for.

    `hold`: such a change stands for a while, then scaling goes on from it. `stop`: until this
    process is started again. `ignore`: scaling goes on at once.
    """

    def __init__(self, rule: Rule, hold_s: float) -> None:
        self._rule = rule
        self._hold_s = hold_s
        self._sizes: dict[Role, int] = {}
        self._tried: dict[Role, set[int]] = {}
        self._changes: dict[Role, _Change] = {}

    def note_try(self, role: Role, replicas: int) -> None:
        """Remember a size that is about to be asked for: the answer may get lost."""
        self._tried.setdefault(role, set()).add(replicas)

    def note_applied(self, role: Role, replicas: int) -> None:
        """Remember a size that the target took."""
        self._sizes[role] = replicas
        self._tried.pop(role, None)

    def problems(self, sizes: Mapping[Role, int], now_s: float) -> tuple[str, ...]:
        """Take what the target says; return why pools must be left alone, if they must."""
        for role, size in sizes.items():
            known = self._sizes.get(role)
            if known is not None and size != known and size not in self._tried.get(role, ()):
                self._changes[role] = _Change(known, size, now_s)
            if size != known:
                self._sizes[role] = size
                self._tried.pop(role, None)
        if self._rule == "ignore":
            return ()
        lines = (self._line(role, change, now_s) for role, change in self._changes.items())
        return tuple(line for line in lines if line is not None)

    def _line(self, role: Role, change: _Change, now_s: float) -> str | None:
        what = f"somebody else set {role.value} from {change.before} to {change.after}"
        if self._rule == "stop":
            return problem("target-changed", f"{what}; left alone until the next start")
        left_s = change.at_s + self._hold_s - now_s
        if left_s <= 0:
            return None
        return problem("target-changed", f"{what}; left alone for {left_s:.0f} s more")
