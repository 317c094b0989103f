"""The versions of a target's drafts: kept on disk, each with its record, and who stands where.

Decisions come from gate.py and canary.py by way of the trainer, or from an operator; stages.py
says what they do, registry_files.py makes them last. Calls block on the disk. Changes are
serialised by a lock; reads see the state before or after one, so they may come from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from paceline.domain.draft_files import version_of
from paceline.domain.draft_records import DraftRecord, DraftScore, DraftStage
from paceline.domain.drafts import MODEL_DRAFTER, DraftEntry
from paceline.domain.errors import (
    AlreadyExistsError,
    CorruptDraftError,
    ExhaustedError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
)
from paceline.engine.checkpoint_files import UnsupportedModelError
from paceline.engine.checkpoint_files import model_digest as digest_of
from paceline.trainer import plans, stages
from paceline.trainer.registry_files import Contents, RegistryFiles, checkpoint_files
from paceline.trainer.stages import Change, Standing, Verdict


class Registry:
    """Versions of all drafters of one target."""

    def __init__(
        self,
        directory: Path,
        *,
        model_digest: str,
        time_s: Callable[[], float],
        keep: int = 16,
        max_bytes: int = 8 << 30,
    ) -> None:
        """Open or begin the registry in `directory`.

        `time_s` gives seconds since 1970. Beyond `keep` versions or `max_bytes` the oldest go,
        but none that is in use, on trial, pinned, the floor, or to go back to.

        Raises:
            PreconditionError: it is of another target, or another process has it.
        """
        self._files = RegistryFiles(directory, model_digest)
        self._time_s = time_s
        self._keep, self._max_bytes = keep, max_bytes
        self._lock = threading.RLock()
        self._contents = self._files.load()
        self._reconcile()

    def import_floor(self, checkpoint: Path, drafter: str = MODEL_DRAFTER) -> DraftRecord:
        """Take the draft that always stays; it is active where no other is, or the old floor was.

        The same checkpoint again is the same record.

        Raises:
            InvalidRequestError, ExhaustedError: as `add`.
        """
        with self._lock:
            record = self.add(checkpoint, drafter=drafter, parent="", num_samples=0, num_tokens=0)
            standing = self._standing(drafter)
            if standing.floor == record.version and standing.active:
                return record
            activates = not standing.pinned and standing.active in ("", standing.floor)
            change = Change(standing, {})
            if activates and standing.active != record.version:
                verdict = Verdict(DraftStage.ACTIVE, "floor")
                change = stages.activate(
                    self._contents.records, standing, record.version, verdict, self._time_s()
                )
            after = replace(change.standing, floor=record.version)
            own = {**self._own(drafter), **change.records}
            flags = stages.flagged(own, after)
            self._commit(drafter, Change(after, {**change.records, **flags}))
            return self.get(record.version)

    def add(
        self,
        checkpoint: Path,
        *,
        drafter: str,
        parent: str,
        num_samples: int,
        num_tokens: int,
        rank: int = 0,
    ) -> DraftRecord:
        """Copy a checkpoint as a candidate; one that is here already is returned as it stands.

        Raises:
            InvalidRequestError: it is no checkpoint of safetensors.
            AlreadyExistsError: another drafter has the same weights.
            ExhaustedError: it is too big, or the disk is full; nothing changed.
            InternalError: it cannot be written; nothing changed.
        """
        with self._lock:
            made: list[DraftRecord] = []

            def describe(digest: str, num_bytes: int) -> DraftRecord | None:
                known = self._contents.records.get(version_of(digest))
                if known is not None:
                    made.append(_same(known, digest, drafter))
                    return None
                if num_bytes > self._max_bytes:
                    raise ExhaustedError(
                        f"{num_bytes} bytes, the registry keeps {self._max_bytes}",
                        reason="draft-too-big",
                    )
                number = self._contents.last_number + 1
                record = DraftRecord(
                    version=version_of(digest),
                    digest=digest,
                    number=number,
                    drafter=drafter,
                    parent=parent,
                    created_s=self._time_s(),
                    stage=DraftStage.CANDIDATE,
                    num_bytes=num_bytes,
                    num_samples=num_samples,
                    num_tokens=num_tokens,
                    rank=rank,
                )
                made.append(record)
                return record

            try:
                self._files.take(checkpoint, describe)
            except UnsupportedModelError as error:
                raise InvalidRequestError(
                    "checkpoint", error.message, reason=error.reason
                ) from error
            record = made[0]
            if record.version not in self._contents.records:
                self._contents = Contents(
                    {**self._contents.records, record.version: record},
                    self._contents.standings,
                    record.number,
                )
                self._prune(record.version)
            return record

    def decide(
        self,
        version: str,
        stage: DraftStage,
        reason: str,
        detail: str = "",
        scores: Sequence[DraftScore] = (),
    ) -> DraftRecord:
        """Move a version to a stage, and others with it; `stages.TRANSITIONS` says what may be.

        Taking the active version back makes the previous one active, or the floor.

        Raises:
            NotFoundError: there is no such version.
            PreconditionError: it may not go there, or another holds the place.
            ExhaustedError: it would be one drafter too many.
        """
        with self._lock:
            record = self.get(version)
            if stage is DraftStage.ACTIVE:
                self.check_room(record.drafter)
            standing = self._standing(record.drafter)
            successor = ""
            if record.version == standing.active and stage is DraftStage.ROLLED_BACK:
                successor = self._successor(standing)
            change = stages.decide(
                self._own(record.drafter),
                standing,
                record.version,
                Verdict(stage, reason, detail, tuple(scores)),
                self._time_s(),
                successor,
            )
            self._commit(record.drafter, change)
            return self.get(record.version)

    def rollback(self, drafter: str = MODEL_DRAFTER, version: str = "") -> DraftRecord:
        """Go back to a version that was in use, or to the previous one; return it.

        Raises:
            NotFoundError: no such version, or nothing of this drafter is active.
            PreconditionError: it was never in use, is active, or a version is pinned.
            CorruptDraftError: its bytes have changed.
        """
        with self._lock:
            standing = self._standing(drafter)
            self._active(drafter)
            if standing.pinned:
                raise PreconditionError(f"{standing.pinned} is pinned", reason="draft-pinned")
            if version:
                target = self._of(drafter, version)
                if target.version == standing.active:
                    raise PreconditionError(f"{target.version} is active", reason="draft-active")
                usable = (DraftStage.RETIRED, DraftStage.ROLLED_BACK)
                if target.stage not in usable and not target.is_floor:
                    raise PreconditionError(
                        f"{target.version} was never in use; pin it to use it",
                        reason="draft-never-used",
                    )
                self.verify(target.version)
                successor = target.version
            else:
                successor = self._successor(standing)
            verdict = Verdict(DraftStage.ROLLED_BACK, "operator-rollback")
            own, now_s = self._own(drafter), self._time_s()
            self._commit(drafter, stages.take_back(own, standing, verdict, now_s, successor))
            return self._active(drafter)

    def pin(self, drafter: str, version: str) -> DraftRecord:
        """Make a version active until it is unpinned, whatever is decided; return it.

        An empty version unpins.

        Raises:
            NotFoundError, InvalidRequestError: no such version, or several.
            CorruptDraftError: its bytes have changed.
            ExhaustedError: it would be one drafter too many.
        """
        with self._lock:
            if not version:
                return self.unpin(drafter)
            self.check_room(drafter)
            target = self._of(drafter, version)
            self.verify(target.version)
            own, standing = self._own(drafter), self._standing(drafter)
            self._commit(drafter, stages.pin(own, standing, target.version, self._time_s()))
            return self._active(drafter)

    def unpin(self, drafter: str) -> DraftRecord:
        """Let the active version be exchanged again; return it.

        Raises:
            NotFoundError: nothing of this drafter is active.
        """
        with self._lock:
            standing = self._standing(drafter)
            if standing.pinned:
                change = stages.unpin(self._own(drafter), standing, self._time_s())
                self._commit(drafter, change)
            return self._active(drafter)

    def remove(self, drafter: str) -> DraftRecord:
        """Give a member of the bank up; return the version that was active.

        Its versions stay for as long as there is room: pinning or offering one brings it back.

        Raises:
            NotFoundError: nothing of this drafter is active.
            PreconditionError: it is the one that everybody may use, or a version is pinned.
        """
        with self._lock:
            if drafter == MODEL_DRAFTER:
                raise PreconditionError(f"{drafter} is what a bank begins with", reason="no-member")
            was, own = self._active(drafter), self._own(drafter)
            self._commit(drafter, stages.remove(own, self._standing(drafter), self._time_s()))
            return self.get(was.version)

    def check_room(self, drafter: str) -> None:
        """Refuse a drafter that would be one too many for engines.

        Raises:
            ExhaustedError: it would.
        """
        stages.check_room(self._contents.standings, drafter)

    def get(self, prefix: str) -> DraftRecord:
        """Return the version, or the one that begins like this.

        Raises:
            NotFoundError: there is none.
            InvalidRequestError: there are several.
        """
        found = sorted(v for v in self._contents.records if prefix and v.startswith(prefix))
        if not found:
            raise NotFoundError(f"no draft begins with {prefix!r}", reason="draft-not-found")
        if len(found) > 1:
            raise InvalidRequestError(
                "version", f"{prefix!r} begins {', '.join(found)}", reason="draft-ambiguous"
            )
        return self._contents.records[found[0]]

    def records(self, drafter: str = "") -> list[DraftRecord]:
        """Return the versions of a drafter, or all, newest first."""
        found = [r for r in self._contents.records.values() if drafter in ("", r.drafter)]
        return sorted(found, key=lambda record: -record.number)

    def active(self, drafter: str = MODEL_DRAFTER) -> DraftRecord | None:
        """Return the version in use."""
        return self._contents.records.get(self._standing(drafter).active)

    def canary(self, drafter: str = MODEL_DRAFTER) -> DraftRecord | None:
        """Return the version on trial."""
        return self._contents.records.get(self._standing(drafter).canary)

    def floor(self, drafter: str = MODEL_DRAFTER) -> DraftRecord | None:
        """Return the version that always stays."""
        return self._contents.records.get(self._standing(drafter).floor)

    def previous(self, drafter: str = MODEL_DRAFTER) -> DraftRecord | None:
        """Return the version to go back to."""
        return self._contents.records.get(self._standing(drafter).previous)

    def files(self, version: str) -> list[Path]:
        """Return the files of a version.

        Raises:
            NotFoundError: there is no such version.
            CorruptDraftError: they are not there.
        """
        record = self.get(version)
        directory = self._files.path(record.version)
        try:
            return [directory / name for name in checkpoint_files(directory)]
        except (UnsupportedModelError, OSError) as error:
            raise CorruptDraftError(f"{record.version}: {error}") from error

    def verify(self, version: str) -> None:
        """Compute a version's digest again.

        Raises:
            NotFoundError: there is no such version.
            CorruptDraftError: it is another one.
        """
        record = self.get(version)
        try:
            digest = digest_of(self._files.path(record.version))
        except (UnsupportedModelError, OSError) as error:
            raise CorruptDraftError(f"{record.version}: {error}") from error
        if digest != record.digest:
            raise CorruptDraftError(f"{record.version}: its bytes have the digest {digest}")

    def plan(
        self, *, canary_share: float = 0.1, control_share: float = 0.0
    ) -> tuple[DraftEntry, ...]:
        """Return what to draft with, by drafter; plans.py says for which sequences."""
        return plans.entries_of(
            self._contents, canary_share=canary_share, control_share=control_share
        )

    def control_of(self, drafter: str = MODEL_DRAFTER) -> str:
        """Return the version that the active one is to be compared with live; empty for none."""
        return plans.control_of(self._standing(drafter))

    def _reconcile(self) -> None:
        for drafter in list(self._contents.standings):
            standing = self._standing(drafter)
            change = stages.reconcile(self._own(drafter), standing, self._time_s())
            if change.records or change.standing != standing:
                self._commit(drafter, change)

    def _commit(self, drafter: str, change: Change) -> None:
        after = Contents(
            {**self._contents.records, **change.records},
            {**self._contents.standings, drafter: change.standing},
            self._contents.last_number,
        )
        self._files.commit(change.records, after)
        self._contents = after

    def _prune(self, newest: str) -> None:
        """Remove the oldest that nobody needs; numbers are not given twice."""
        records = dict(self._contents.records)
        needed = {newest}.union(*(s.versions for s in self._contents.standings.values()))
        surplus = []
        for record in reversed(self.records()):
            num_bytes = sum(r.num_bytes for r in records.values())
            if len(records) <= self._keep and num_bytes <= self._max_bytes:
                break
            if record.version not in needed:
                surplus.append(record.version)
                del records[record.version]
        if not surplus:
            return
        after = Contents(records, self._contents.standings, self._contents.last_number)
        self._files.commit({}, after)
        self._contents = after
        for version in surplus:
            self._files.remove(version)

    def _successor(self, standing: Standing) -> str:
        """Return the version to go back to whose bytes are whole; empty for none."""
        for version in (standing.previous, standing.floor):
            if version and version != standing.active:
                try:
                    self.verify(version)
                except CorruptDraftError:
                    continue
                return version
        return ""

    def _own(self, drafter: str) -> Mapping[str, DraftRecord]:
        return {v: r for v, r in self._contents.records.items() if r.drafter == drafter}

    def _standing(self, drafter: str) -> Standing:
        return self._contents.standings.get(drafter, Standing())

    def _active(self, drafter: str) -> DraftRecord:
        record = self.active(drafter)
        if record is None:
            raise NotFoundError(f"{drafter} has no active draft", reason="draft-not-found")
        return record

    def _of(self, drafter: str, version: str) -> DraftRecord:
        record = self.get(version)
        if record.drafter != drafter:
            raise NotFoundError(
                f"{record.version} is of {record.drafter}", reason="draft-not-found"
            )
        return record


def _same(record: DraftRecord, digest: str, drafter: str) -> DraftRecord:
    if record.digest != digest or record.drafter != drafter:
        raise AlreadyExistsError(
            f"{record.version} is a version of {record.drafter}", reason="draft-exists"
        )
    return record
