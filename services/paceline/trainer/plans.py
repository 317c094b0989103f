"""What a registry's contents mean for drafting: which versions, for what share; pure.

registry.py asks with what is on the disk, workers get the answer.
"""

from __future__ import annotations

from paceline.domain.draft_records import DraftRecord
from paceline.domain.drafts import DraftEntry, DraftFile
from paceline.trainer.registry_files import Contents
from paceline.trainer.stages import Standing


def entries_of(
    contents: Contents, *, canary_share: float, control_share: float
) -> tuple[DraftEntry, ...]:
    """Return what to draft with, by drafter.

    A version on trial gets `canary_share` of the sequences. Without one, the previous version
    (or the floor) keeps `control_share`, for canary.LiveWatch to compare with.
    """
    records, entries = contents.records, []
    for drafter, standing in sorted(contents.standings.items()):
        if not standing.active:
            continue
        other, share = standing.canary, canary_share
        if not other and not standing.pinned:
            other, share = control_of(standing), control_share
        second = _file(records[other]) if other and share > 0 else None
        active = _file(records[standing.active])
        entries.append(DraftEntry(drafter, active, second, share if second else 0.0))
    return tuple(entries)


def control_of(standing: Standing) -> str:
    """Return the version that the active one is to be compared with live; empty for none."""
    return next((v for v in (standing.previous, standing.floor) if v != standing.active), "")


def _file(record: DraftRecord) -> DraftFile:
    return DraftFile(record.version, record.digest, record.num_bytes)
