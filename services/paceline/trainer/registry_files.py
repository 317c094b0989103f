"""The registry's files: what lies where, and how a change of several files is one change.

    DIRECTORY/registry.json                 whose target, who stands out, the last change
    DIRECTORY/versions/VERSION/             a checkpoint's files
    DIRECTORY/versions/VERSION/record.json  its record

A version appears whole, with its record, by one rename. A later change is one rename of
registry.json, which holds the changed records too; they are written to their places afterwards
and, should that not happen, at the next start. So a crash at any point leaves the state before
or after a change. registry.py is the only caller.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from paceline.domain.draft_files import CONFIG, WEIGHTS_SUFFIX, is_draft_file
from paceline.domain.draft_records import DraftRecord
from paceline.domain.errors import InvalidRequestError, PreconditionError
from paceline.engine.checkpoint_files import UnsupportedModelError, model_digest, weight_files
from paceline.trainer import disk
from paceline.trainer.record import record_from_json, record_to_json
from paceline.trainer.stages import Standing, standing_of

logger = logging.getLogger(__name__)

_FORMAT = 1
_RECORD = "record.json"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Contents:
    """What a registry holds."""

    records: Mapping[str, DraftRecord] = field(default_factory=dict)
    standings: Mapping[str, Standing] = field(default_factory=dict)
    """By drafter."""
    last_number: int = 0


class RegistryFiles:
    """A registry's directory. It belongs to one process at a time."""

    def __init__(self, directory: Path, digest: str) -> None:
        """Take the directory for drafts of the target with this digest.

        Raises:
            PreconditionError: another process has it.
        """
        self._head = directory / "registry.json"
        self._versions = directory / "versions"
        self._digest = digest
        self._unwritten: dict[str, DraftRecord] = {}
        with disk.writing(directory):
            self._versions.mkdir(parents=True, exist_ok=True)
            lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        weakref.finalize(self, os.close, lock)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PreconditionError(
                f"another process uses {directory}", reason="registry-in-use"
            ) from error

    def path(self, version: str) -> Path:
        """Return the place of a version's files."""
        return self._versions / version

    def load(self) -> Contents:
        """Read all there is; what cannot be read is left out and logged.

        Raises:
            PreconditionError: the registry is of another target or form.
        """
        head = self._read_head()
        with disk.writing(self._versions):
            disk.clear_leftovers(self._versions.parent)
            disk.clear_leftovers(self._versions)
        records = {}
        for path in sorted(self._versions.iterdir()):
            try:
                record = self._read_record(path)
            except (OSError, ValueError, TypeError, KeyError, UnsupportedModelError) as error:
                _log_skipped(path, f"{type(error).__name__}: {error}")
            else:
                records[record.version] = record
        changed = {r.version: r for r in head.records.values() if r.version in records}
        self._unwritten = {v: r for v, r in changed.items() if records[v] != r}
        records |= changed
        drafters = {record.drafter for record in records.values()} | set(head.standings)
        standings = {
            name: head.standings.get(name) or standing_of(records.values(), name)
            for name in drafters
        }
        numbers = (head.last_number, *(record.number for record in records.values()))
        return Contents(records, standings, max(numbers))

    def commit(self, changed: Mapping[str, DraftRecord], after: Contents) -> None:
        """Make a change last: these records differ from what is on the disk.

        Raises:
            ExhaustedError, InternalError: it could not be written; nothing changed.
        """
        unwritten = {v: r for v, r in {**self._unwritten, **changed}.items() if v in after.records}
        values = {
            "format": _FORMAT,
            "model_digest": self._digest,
            "last_number": after.last_number,
            "drafters": {name: asdict(s) for name, s in sorted(after.standings.items())},
            "changed": [record_to_json(record) for record in unwritten.values()],
        }
        with disk.writing(self._head.parent):
            disk.write_json(self._head, values, self._head.parent)
        self._unwritten = unwritten
        for version, record in list(unwritten.items()):
            try:
                self._write_record(self.path(version), record)
            except OSError as error:
                # It is in registry.json and goes along with the next change.
                _log_skipped(self.path(version), f"record not written yet: {error}")
            else:
                del self._unwritten[version]

    def take(self, checkpoint: Path, describe: Callable[[str, int], DraftRecord | None]) -> None:
        """Copy a checkpoint; `describe` gets digest and size and returns its record, or None.

        Raises:
            InvalidRequestError: it is no checkpoint of safetensors.
            ExhaustedError, InternalError: it could not be written; nothing is left behind.
        """
        names = checkpoint_files(checkpoint)
        with disk.writing(self._versions), disk.staging(self._versions) as staged:
            for name in names:
                disk.copy_file(checkpoint / name, staged / name)
            check_weights(staged)
            record = describe(model_digest(staged), _size(staged, names))
            if record is None:
                return
            self._write_record(staged, record)
            place = self.path(record.version)
            if place.exists():  # It could not be read; see load().
                disk.remove(place)
            disk.publish(staged, place)

    def remove(self, version: str) -> None:
        """Remove a version's files."""
        self._unwritten.pop(version, None)
        with disk.writing(self._versions):
            disk.remove(self.path(version))

    def _read_head(self) -> Contents:
        try:
            values = json.loads(self._head.read_text(encoding="utf-8"))
            format_, digest = values["format"], values["model_digest"]
            changed = [] if format_ != _FORMAT else values["changed"]
            contents = Contents(
                {record["version"]: record_from_json(record) for record in changed},
                {name: Standing(**standing) for name, standing in values["drafters"].items()},
                int(values["last_number"]),
            )
        except FileNotFoundError:
            return Contents()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            # The records tell who stood where.
            _log_skipped(self._head, f"{type(error).__name__}: {error}")
            return Contents()
        if format_ != _FORMAT:
            raise PreconditionError(
                f"{self._head} has format {format_}, this build reads {_FORMAT}",
                reason="registry-format",
            )
        if digest != self._digest:
            raise PreconditionError(
                f"{self._head} is of the target {digest[:12]}, not of {self._digest[:12]}",
                reason="registry-of-another-model",
            )
        return contents

    def _read_record(self, path: Path) -> DraftRecord:
        values = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        if values["format"] != _FORMAT or values["model_digest"] != self._digest:
            raise ValueError("of another target or format")
        record = record_from_json(values["record"])
        if record.version != path.name:
            raise ValueError(f"its record is of {record.version}")
        size = _size(path, checkpoint_files(path))
        if size != record.num_bytes:
            raise ValueError(f"{size} bytes, {record.num_bytes} expected")
        return record

    def _write_record(self, directory: Path, record: DraftRecord) -> None:
        values = {"format": _FORMAT, "model_digest": self._digest, "record": record_to_json(record)}
        disk.write_json(directory / _RECORD, values, self._versions)


def checkpoint_files(directory: Path) -> list[str]:
    """Return the names of the files that make a checkpoint; others beside them do not count.

    Raises:
        UnsupportedModelError: it has no safetensors.
    """
    if not (directory / CONFIG).is_file():
        raise UnsupportedModelError(f"{CONFIG} is missing")
    weights = {path.name for path in weight_files(directory)}
    return sorted(
        path.name
        for path in directory.iterdir()
        if path.is_file()
        and is_draft_file(path.name)
        and (not path.name.endswith((WEIGHTS_SUFFIX, ".index.json")) or path.name in weights)
    ) + ([_INDEX] if (directory / _INDEX).is_file() else [])


def check_weights(directory: Path) -> None:
    """Read the headers of all weights.

    Raises:
        InvalidRequestError: one is no whole safetensors file.
    """
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="numpy") as file:
                names = list(file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise InvalidRequestError(
                "checkpoint", f"{path.name}: {error}", reason="draft-not-safetensors"
            ) from error
        if not names:
            raise InvalidRequestError("checkpoint", f"{path.name} is empty", reason="draft-empty")


def _size(directory: Path, names: list[str]) -> int:
    return sum((directory / name).stat().st_size for name in names)


def _log_skipped(path: Path, why: str) -> None:
    fields: dict[str, Any] = {"path": str(path), "why": why}
    logger.warning("draft-skipped", extra={"fields": fields})
