"""Only one autoscaler acts per fleet: the one that holds the fleet's record under its lease.

All have the same member id. Another waits until that record's lease has ended and takes it over;
the epoch of the membership then fences the one before, should it come back from a long pause.
"""

from __future__ import annotations

import asyncio
import logging

from paceline.domain.errors import UnavailableError
from paceline.process.membership import Membership

logger = logging.getLogger(__name__)

_POLL_S = 0.5


async def stand_by(membership: Membership, member_id: str) -> None:
    """Return once nobody holds the record; waits for Redis, too."""
    said = ""
    while True:
        state = await _state(membership, member_id)
        if not state:
            return
        if state != said:
            logger.info("standing-by", extra={"fields": {"because": state}})
            said = state
        await asyncio.sleep(_POLL_S)


async def _state(membership: Membership, member_id: str) -> str:
    """Return why to wait, empty if there is no reason."""
    try:
        members = await membership.members()
    except UnavailableError as error:
        return error.message
    holder = next((member for member in members if member.id == member_id), None)
    return "" if holder is None else f"{member_id} runs as process {holder.pid}"
