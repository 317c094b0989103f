"""Drafts that a worker fetched: checked, kept within a bound, each appearing whole or not at all.

    DIRECTORY/VERSION/          files of a version, as their digest names them
    DIRECTORY/.fetch-*/         a fetch that runs

Workers of one machine and user share the directory; a version is the same for all. Whoever
uses a version checks its digest first, so that nothing here has to be believed. Blocking;
worker/drafts.py calls from threads.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from paceline.domain.draft_files import MAX_FILES, is_draft_file, is_version, version_of
from paceline.domain.drafts import DraftFile
from paceline.domain.errors import PacelineError
from paceline.engine.checkpoint_files import UnsupportedModelError, model_digest

_FETCH = ".fetch-"

_ABANDONED_S = 3600.0
"""A fetch that was not touched for this long belongs to a worker that died."""


class DraftRefusedError(PacelineError):
    """What was fetched cannot be used; `reason` says why."""

    reason = "draft-refused"


class DraftCache:
    """The versions on this machine."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """Keep about `max_bytes` under `directory`, which only this user may read."""
        self.directory = directory
        self._max_bytes = max_bytes

    def find(self, file: DraftFile) -> Path | None:
        """Return where a version lies; one whose bytes have changed is removed.

        Raises:
            DraftRefusedError: it is not named by its digest.
        """
        _check(file)
        path = self.directory / file.version
        if not path.is_dir():
            return None
        try:
            if model_digest(path) == file.digest:
                # The age by which `make_room` goes.
                os.utime(path)
                return path
        except (UnsupportedModelError, OSError):
            pass
        shutil.rmtree(path, ignore_errors=True)
        return None

    def open(self, file: DraftFile) -> Incoming:
        """Begin to take in a version.

        Raises:
            DraftRefusedError: it is too large for the bound, or not named by its digest.
            OSError: nothing can be written.
        """
        _check(file)
        if file.num_bytes > self._max_bytes:
            text = f"{file.num_bytes} bytes, the bound is {self._max_bytes}"
            raise DraftRefusedError(text, reason="too-large")
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Incoming(self.directory, file)

    def make_room(self, in_use: set[str]) -> None:
        """Remove the versions unused for longest until the bound holds, but none `in_use`."""
        now_s = time.time()
        found: list[tuple[float, int, Path]] = []
        with suppress(FileNotFoundError):
            for path in list(self.directory.iterdir()):
                with suppress(OSError):
                    age_s = now_s - path.stat().st_mtime
                    if path.name.startswith(_FETCH):
                        if age_s > _ABANDONED_S:
                            shutil.rmtree(path, ignore_errors=True)
                    elif is_version(path.name):
                        found.append((age_s, _size(path), path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found, reverse=True):
            if total <= self._max_bytes:
                return
            if path.name not in in_use:
                shutil.rmtree(path, ignore_errors=True)
                total -= size


class Incoming:
    """A version that is being fetched."""

    def __init__(self, parent: Path, file: DraftFile) -> None:
        self._file = file
        self._parent = parent
        self._directory = Path(tempfile.mkdtemp(prefix=_FETCH, dir=parent))
        self._names: set[str] = set()
        self._out: IO[bytes] | None = None
        self._name = ""
        self.num_bytes = 0

    def write(self, name: str, data: bytes) -> None:
        """Append to a file; another name than before begins the next file.

        Raises:
            DraftRefusedError: a name that no draft has, or more than was announced.
            OSError: it cannot be written.
        """
        if name != self._name or self._out is None:
            self._begin(name)
        self.num_bytes += len(data)
        if self.num_bytes > self._file.num_bytes:
            raise DraftRefusedError("more bytes than announced", reason="too-large")
        assert self._out is not None
        self._out.write(data)

    def finish(self) -> Path:
        """Check the digest and put the version in its place; return that.

        Raises:
            DraftRefusedError: these are not the bytes that the digest names.
            OSError: it cannot be written.
        """
        self._end_file()
        try:
            digest = model_digest(self._directory)
        except UnsupportedModelError as error:
            raise DraftRefusedError(error.message, reason="not-a-draft") from error
        if digest != self._file.digest:
            raise DraftRefusedError(
                f"the digest is {digest}, not {self._file.digest}", reason="wrong-digest"
            )
        place = self._parent / self._file.version
        try:
            os.rename(self._directory, place)
        except OSError as error:
            # Another worker of this machine was faster, and checked as well.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        return place

    def remove(self) -> None:
        """Leave nothing of a fetch that did not finish."""
        with suppress(OSError):
            self._end_file()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _begin(self, name: str) -> None:
        self._end_file()
        is_new = name not in self._names and len(self._names) < MAX_FILES
        if not is_new or not is_draft_file(name):
            raise DraftRefusedError(f"{name!r} is no file of a draft", reason="bad-file")
        self._names.add(name)
        self._name, self._out = name, open(self._directory / name, "xb")  # noqa: SIM115

    def _end_file(self) -> None:
        out, self._out = self._out, None
        if out is not None:
            out.close()


def _check(file: DraftFile) -> None:
    if not is_version(file.version) or version_of(file.digest) != file.version:
        text = f"{file.version!r} is not the beginning of its digest"
        raise DraftRefusedError(text, reason="bad-version")


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())
