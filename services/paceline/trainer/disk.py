"""Writes that a crash cannot tear: what is there afterwards is the old state or the new one.

A file is written beside its place, flushed to the disk and moved; a directory likewise. What a
crash leaves behind begins with a dot and is removed at the next start. registry.py calls this.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paceline.domain.errors import ExhaustedError, InternalError

_STAGING, _TRASH = ".staging-", ".trash-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Map what the system says while something is written.

    Raises:
        ExhaustedError: the disk, or the quota, is full.
        InternalError: it cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ExhaustedError(f"no space left for {directory}", reason="disk-full") from error
        raise InternalError(f"{directory}: {error}", reason="registry-not-writable") from error


def write_json(path: Path, values: Any, scratch: Path) -> None:
    """Put JSON in the place of a file; readers see the old one or the whole new one.

    It is written in `scratch`, a directory of the same file system that `clear_leftovers` is
    called for.
    """
    handle, name = tempfile.mkstemp(prefix=_STAGING, dir=scratch)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        _forget(Path(name))
        raise
    sync_directory(path.parent)


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """Yield a new directory beside the places of others; it is gone afterwards unless moved."""
    directory = Path(tempfile.mkdtemp(prefix=_STAGING, dir=parent))
    try:
        yield directory
    finally:
        _forget(directory)


def copy_file(source: Path, place: Path) -> None:
    """Copy a file's bytes to the disk."""
    shutil.copyfile(source, place)
    with place.open("rb") as file:
        os.fsync(file.fileno())


def publish(directory: Path, place: Path) -> None:
    """Move a staged directory to its place, where nothing is."""
    directory.chmod(0o755)
    sync_directory(directory)
    os.rename(directory, place)
    sync_directory(place.parent)


def remove(directory: Path) -> None:
    """Remove a directory; it is gone for readers at once."""
    aside = Path(tempfile.mkdtemp(prefix=_TRASH, dir=directory.parent))
    os.rename(directory, aside / directory.name)
    sync_directory(directory.parent)
    _forget(aside)


def clear_leftovers(directory: Path) -> None:
    """Remove what a crash left here."""
    for path in directory.iterdir():
        if path.name.startswith((_STAGING, _TRASH)):
            _forget(path)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory last."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _forget(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
