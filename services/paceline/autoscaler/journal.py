"""What was seen, decided and done: the last decisions in memory, all in a bounded file.

The file holds JSON lines, one per decision (`number`, `observation`, `decision`) and one per
decision that changed something (`number`, `effects`); sources/replay.py reads it. When it is
full it becomes FILE.1, and the FILE.1 before it goes.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from paceline.autoscaler.record import decision_to_json, observation_to_json
from paceline.autoscaler.steering import Effect
from paceline.autoscaler.values import POOLS, Decision, Observation, Replica
from paceline.domain.member import Role

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision with what led to it and what came of it."""

    number: int
    observation: Observation
    decision: Decision
    effects: tuple[Effect, ...] = ()


class Journal:
    """Keeps entries."""

    def __init__(self, num_kept: int, file: JournalFile | None = None) -> None:
        self._entries: deque[Entry] = deque(maxlen=num_kept)
        self._file = file
        self._number = 0

    def note_decision(self, observation: Observation, decision: Decision) -> Entry:
        """Keep a decision."""
        self._number += 1
        entry = Entry(self._number, observation, decision)
        self._entries.append(entry)
        if self._file is not None:
            self._file.write_decision(entry)
        return entry

    def note_effects(self, effects: Sequence[Effect]) -> None:
        """Keep what came of the last decision."""
        if not effects or not self._entries:
            return
        self._entries[-1] = replace(self._entries[-1], effects=tuple(effects))
        if self._file is not None:
            self._file.write_effects(self._entries[-1])

    def last(self, num: int) -> list[Entry]:
        """Return the last entries, oldest first."""
        return list(self._entries)[-num:] if num > 0 else []

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class JournalFile:
    """Appends lines to a file and its one predecessor. A disk that refuses costs lines only."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Both files together stay below `max_bytes`."""
        self._path = path
        self._max_bytes = max_bytes // 2
        self._stream: TextIO | None = None
        self._size = 0
        self._known: dict[Role, Replica | None] = {}
        self._is_failing = False

    def write_decision(self, entry: Entry) -> None:
        """Write a decision and what led to it."""
        try:
            self._make_room()
            observation = observation_to_json(entry.observation, self._known)
            decision = decision_to_json(entry.decision)
            values = {"observation": observation, "decision": decision}
            self._write({"number": entry.number, **values})
            self._known = {role: pool.replica for role, pool in entry.observation.pools.items()}
        except OSError as error:
            self._note_failure(error)

    def write_effects(self, entry: Entry) -> None:
        """Write what came of the decision of the line before."""
        try:
            effects = [effect_to_json(effect) for effect in entry.effects]
            self._write({"number": entry.number, "effects": effects})
        except OSError as error:
            self._note_failure(error)

    def close(self) -> None:
        """Close the file."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _make_room(self) -> None:
        """Open the file, or begin a new one; either begins without known replicas."""
        if self._stream is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("a", encoding="utf-8")
            self._size = self._stream.tell()
            self._known = {}
        if self._size >= self._max_bytes:
            self.close()
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._make_room()

    def _write(self, data: dict[str, Any]) -> None:
        if self._stream is None:
            return
        line = json.dumps(data, separators=(",", ":")) + "\n"
        self._stream.write(line)
        self._stream.flush()
        self._size += len(line)
        if self._is_failing:
            logger.info("journal-writable")
        self._is_failing = False

    def _note_failure(self, error: OSError) -> None:
        """Give up the stream; the next decision opens it again."""
        with suppress(OSError):
            self.close()
        if not self._is_failing:
            fields = {"path": str(self._path), "error": str(error)}
            logger.warning("journal-unwritable", extra={"fields": fields})
        self._is_failing = True


def effect_to_json(effect: Effect) -> dict[str, Any]:
    """Return plain values."""
    return {**asdict(effect), "role": effect.role.value}


def entry_to_json(entry: Entry) -> dict[str, Any]:
    """Return what /decisions shows and `paceline autoscaler explain` prints."""
    observation, decision = entry.observation, entry.decision
    return {
        "number": entry.number,
        "at_s": decision.at_s,
        "kind": decision.kind,
        "reason": decision.reason,
        "pools": {
            role.value: {
                "desired": decision.replicas[role],
                "requested": observation.pools[role].requested,
                "ready": observation.pools[role].ready,
                "starting": observation.pools[role].starting,
                "draining": num_draining(observation, role),
            }
            for role in POOLS
        },
        "parked": observation.parked,
        "inputs": dict(decision.inputs),
        "victims": {role.value: list(ids) for role, ids in decision.victims.items()},
        "problems": list(observation.problems),
        "effects": [effect_to_json(effect) for effect in entry.effects],
    }


def num_draining(observation: Observation, role: Role) -> int:
    """Return how many workers of a pool drain."""
    return sum(worker.is_draining for worker in observation.pools[role].workers)
