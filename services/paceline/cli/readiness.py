"""When is a platform ready: every process registered and attached, the gateway serving.

Polled by cli/launch.py during the start; the judgement itself is pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from paceline.cli.client import is_serving
from paceline.cli.errors import CommandError
from paceline.cli.fleet_plan import GATEWAY_ID
from paceline.cli.supervisor import Supervisor
from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member, Role
from paceline.process.membership import Membership

MAX_START_CRASHES = 3
"""A child that crashed so often in a row before all were ready will not come up."""

NO_MEMBERS = ("redis", "prometheus")
"""Roles of programs that are not ours: they join no fleet."""

USAGE_EXIT_CODE = 2
"""How a service says that its settings are wrong; another try would not help."""


def unready(pids: Mapping[str, int | None], members: Iterable[Member]) -> set[str]:
    """Return the ids that are not registered by their present process, or not attached."""
    by_id = {member.id: member for member in members}
    return {id_ for id_, pid in pids.items() if not _is_ready(by_id.get(id_), pid)}


def _is_ready(member: Member | None, pid: int | None) -> bool:
    if member is None or member.pid != pid or member.is_draining:
        return False
    return member.role not in (Role.PREFILL, Role.DECODE) or member.node_id != ""


def raise_if_failing(supervisor: Supervisor) -> None:
    """Give up on a start that cannot succeed.

    Raises:
        CommandError: a child crashed too often, with its last lines.
    """
    for child in supervisor.children:
        is_hopeless = child.num_crashes >= MAX_START_CRASHES
        is_misused = child.num_crashes > 0 and child.exit_code == USAGE_EXIT_CODE
        if is_hopeless or is_misused:
            raise CommandError(
                f"{child.spec.name} does not start (exit code {child.exit_code}); its last lines:\n"
                + "\n".join(f"  {line}" for line in child.last_lines)
            )


class ReadinessWatch:
    """Asks the membership and the gateway's health who is ready."""

    def __init__(self, membership: Membership, supervisor: Supervisor) -> None:
        self._membership = membership
        self._supervisor = supervisor
        self.gateway: Member | None = None
        """The gateway's record, once it registered."""

    async def unready(self) -> set[str]:
        """Return the ids that are not ready yet; empty once everything is."""
        children = {
            c.spec.name: c.pid
            for c in self._supervisor.children
            if c.spec.role not in NO_MEMBERS and not c.is_stopping
        }
        try:
            members = await self._membership.members()
        except UnavailableError:
            return set(children)
        missing = unready(children, members)
        if GATEWAY_ID not in missing:
            self.gateway = next(member for member in members if member.id == GATEWAY_ID)
            if not await is_serving(self.gateway.address):
                missing.add(GATEWAY_ID)
        return missing
