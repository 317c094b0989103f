"""All children of one platform: started together, drained role by role. cli/launch.py uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from paceline.cli.backoff import BackoffPolicy
from paceline.cli.child import ChildSpec, SupervisedChild
from paceline.cli.child_logs import LogSink
from paceline.process.lifecycle import Tasks

DRAIN_ORDER: tuple[tuple[str, ...], ...] = (
    ("autoscaler",),
    ("gateway",),
    ("trainer",),
    ("prefill", "decode"),
    ("kvstore",),
    ("prometheus", "redis"),
)
"""Who leaves first: callers before those they call."""


class Supervisor:
    """Starts children and ends them; each is restarted by itself."""

    def __init__(
        self,
        tasks: Tasks,
        sink: LogSink,
        policy: BackoffPolicy | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` hears of every start of a process, first ones and restarts, and of every
        child that is gone for good."""
        self._tasks = tasks
        self._sink = sink
        self._policy = policy or BackoffPolicy()
        self._on_change = on_change
        self.children: list[SupervisedChild] = []

    def start(self, spec: ChildSpec) -> SupervisedChild:
        """Start a child and keep it running."""
        child = SupervisedChild(spec, self._sink, self._policy, self._on_change)
        self.children.append(child)
        self._tasks.spawn(child.run(), spec.name, is_vital=True)
        return child

    async def remove(self, child: SupervisedChild) -> None:
        """End a child and forget it."""
        await child.stop()
        self.children.remove(child)
        self._on_change()

    def end(self, child: SupervisedChild) -> None:
        """Let a child drain in the background and forget it then; it is stopping from now on."""
        if not child.is_stopping:
            child.terminate()
            self._tasks.spawn(self.remove(child), f"end-{child.spec.name}")

    def of_role(self, role: str) -> list[SupervisedChild]:
        """Return the children of one role, in the order of their start."""
        return [child for child in self.children if child.spec.role == role]

    def pids(self, roles: Sequence[str]) -> dict[str, list[int]]:
        """Return process ids by role; of a child between two starts, the last one."""
        return {r: [c.pid for c in self.of_role(r) if c.pid is not None] for r in roles}

    async def drain(self, order: Sequence[Sequence[str]] = DRAIN_ORDER) -> bool:
        """End all children, group after group; tell whether none had to be killed."""
        is_orderly = True
        for roles in order:
            group = [child for role in roles for child in self.of_role(role)]
            is_orderly &= all(await asyncio.gather(*(child.stop() for child in group)))
        return is_orderly

    def kill_all(self) -> None:
        """End all children at once."""
        for child in self.children:
            child.kill()
