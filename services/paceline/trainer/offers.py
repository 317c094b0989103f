"""Takes in checkpoints that operators offer: bounded, by allowed names, whole or not at all.

Files are written to a directory of their own, which is gone when the offer is over. Blocking;
trainer/server.py calls from threads.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from paceline.domain.draft_files import CONFIG, MAX_FILES, WEIGHTS_SUFFIX, is_draft_file
from paceline.domain.errors import ExhaustedError, InvalidRequestError
from paceline.engine.checkpoint_files import UnsupportedModelError, model_digest

MAX_OFFERS = 2
"""At a time; each may fill its bound on the disk."""

MAX_HEADER_BYTES = 100 << 20
"""Of a safetensors file, as its format bounds it."""


class Inbox:
    """Makes room for offers."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """Keep offers of up to `max_bytes` each under `directory`, which is emptied."""
        self._directory = directory
        self._max_bytes = max_bytes
        self._num_open = 0
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700, parents=True)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Count an offer for the length of the block; on the event loop.

        Raises:
            ExhaustedError: others are being taken in.
        """
        if self._num_open >= MAX_OFFERS:
            raise ExhaustedError(f"{self._num_open} offers are taken in", reason="too-many-offers")
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    def open(self) -> Offer:
        """Give room to one offer; the caller removes it."""
        return Offer(Path(tempfile.mkdtemp(dir=self._directory)), self._max_bytes)


class Offer:
    """One checkpoint on its way in."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._names: set[str] = set()
        self._file: IO[bytes] | None = None
        self._name = ""

    def write(self, name: str, data: bytes) -> None:
        """Append to a file; another name than before begins the next file.

        Raises:
            InvalidRequestError: the name, or too many bytes.
        """
        if name != self._name or self._file is None:
            self._begin(name)
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            raise InvalidRequestError(
                "data", f"more than {self._max_bytes} bytes", reason="draft-too-large"
            )
        assert self._file is not None
        self._file.write(data)

    def finish(self) -> None:
        """Check that it is a checkpoint and that no file lacks its end.

        Raises:
            InvalidRequestError: what is missing or wrong.
        """
        self._end_file()
        try:
            if CONFIG not in self._names:
                raise UnsupportedModelError(f"{CONFIG} is missing")
            for name in sorted(self._names):
                if name.endswith(WEIGHTS_SUFFIX):
                    _check_whole(self.directory / name)
            model_digest(self.directory)
        except UnsupportedModelError as error:
            raise InvalidRequestError("file", error.message, reason="not-a-draft") from error

    def remove(self) -> None:
        """Leave nothing."""
        with suppress(OSError):
            self._end_file()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _begin(self, name: str) -> None:
        self._end_file()
        if not is_draft_file(name):
            raise InvalidRequestError("file", f"{name!r}: no file of a draft", reason="bad-file")
        if name in self._names:
            raise InvalidRequestError("file", f"{name} comes twice", reason="bad-file")
        if len(self._names) >= MAX_FILES:
            raise InvalidRequestError("file", f"more than {MAX_FILES} files", reason="bad-file")
        self._names.add(name)
        self._name, self._file = name, open(self.directory / name, "xb")  # noqa: SIM115

    def _end_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _check_whole(path: Path) -> None:
    """Compare a safetensors file's length with what its header announces.

    [length of header: u64][header: JSON, by tensor "data_offsets": [begin, end]][data]
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError("its header lacks its end")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        expected = 8 + length + max(ends, default=0)
        if size != expected:
            raise ValueError(f"{size} bytes, its header announces {expected}")
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        struct.error,
    ) as error:
        raise UnsupportedModelError(f"{path.name}: {error}") from error
