"""The arena as a file: made, locked, read back after a crash, removed. Owned by the node.

    | file header, 4 KiB | slab table, 64 bytes per slab | padding to 4 KiB | slabs ... |

The file's name derives from fleet and node id, so that a restarted node finds what the killed
one left. Whoever holds the flock owns it. A file of other size or format is unlinked, never
truncated: workers that still map the old one must not fault.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import re
import stat
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from xxhash import xxh3_64_intdigest

from paceline.domain.blocks import LAYOUT_VERSION
from paceline.domain.errors import AlreadyExistsError
from paceline.kvstore import arena
from paceline.kvstore.slots import ArenaGeometry
from paceline.kvstore.values import BlockShape, Slot, WrittenBlock

logger = logging.getLogger(__name__)

_MAGIC = b"PLARENA1"
_FILE = struct.Struct("<8sIIQQQ16sQQ")
"""magic, format, slabs, file bytes, slab bytes, data offset, tag, epoch, next generation"""
_FORMAT = 1
_SLAB = struct.Struct("<16sQIII")
"""kv_root, block bytes, block size, layout version, 1 if the slab serves a layout"""

_PAGE = 4096
_SLAB_ENTRY = 64
_TABLE_AT = _PAGE
_MIN_SLAB_BYTES = 256 * 1024
_MAX_SLAB_BYTES = 64 * 1024 * 1024
_SLABS_PER_ARENA = 32
"""Small enough that several models share an arena evenly, large enough for blocks of 1/32."""

MIN_ARENA_BYTES = 1024 * 1024
_LOCK_WAIT_S = 2.0
"""A killed node's lock goes with its last thread, a moment after its death."""


@dataclass(frozen=True, slots=True)
class RecoveredSlab:
    """A slab that an earlier process left, with the blocks in it that are whole."""

    slab: int
    shape: BlockShape
    blocks: tuple[WrittenBlock, ...]
    unfinished: tuple[int, ...]
    """Offsets of slots that somebody was writing, and may still be."""


def arena_path(directory: str, fleet: str, node_id: str) -> str:
    """Return the path of a node's arena; a function of its arguments only."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", node_id)[:48]
    return os.path.join(directory, f"paceline-{name}-{_tag(fleet, node_id).hex()[:12]}.arena")


def plan_geometry(num_bytes: int) -> ArenaGeometry:
    """Cut a file of `num_bytes` into slabs: a power of two, about a 32nd of the arena.

    Raises:
        ValueError: the arena is smaller than 1 MiB.
    """
    if num_bytes < MIN_ARENA_BYTES:
        raise ValueError(f"an arena needs at least {MIN_ARENA_BYTES} bytes")
    target = max(num_bytes // _SLABS_PER_ARENA, _MIN_SLAB_BYTES)
    slab_bytes = min(1 << (target.bit_length() - 1), _MAX_SLAB_BYTES)
    table_bytes = num_bytes // slab_bytes * _SLAB_ENTRY
    data_offset = -(-(_TABLE_AT + table_bytes) // _PAGE) * _PAGE
    return ArenaGeometry(data_offset, slab_bytes, (num_bytes - data_offset) // slab_bytes)


class ArenaFile:
    """One mapped and locked arena file; the SlabSpace of a node's BlockStore."""

    def __init__(self, directory: str, fleet: str, node_id: str, num_bytes: int) -> None:
        """Open the node's file, or make it.

        Raises:
            AlreadyExistsError: another process owns it.
            OSError, ValueError: it cannot be made.
        """
        self.path = arena_path(directory, fleet, node_id)
        self.num_bytes = num_bytes
        self._geometry = plan_geometry(num_bytes)
        self._tag = _tag(fleet, node_id)
        self._fd = _open_locked(self.path, num_bytes)
        if os.fstat(self._fd).st_size == 0:
            os.ftruncate(self._fd, num_bytes)
        # The head is written and read like the rest, so it needs memory from the start.
        os.posix_fallocate(self._fd, 0, self._geometry.data_offset)
        self._map = mmap.mmap(self._fd, num_bytes)
        self.view = memoryview(self._map)
        self._load()

    def _load(self) -> None:
        magic, fmt, slabs, size, slab_bytes, data_offset, tag, epoch, generation = (
            _FILE.unpack_from(self.view, 0)
        )
        expected = (_MAGIC, _FORMAT, self.num_bytes, self._tag, *_numbers(self._geometry))
        self.is_recovered = (magic, fmt, size, tag, data_offset, slab_bytes, slabs) == expected
        if not self.is_recovered:
            self.view[: self._geometry.data_offset] = bytes(self._geometry.data_offset)
            epoch, generation = 0, 1
        self.epoch = epoch + 1
        self.next_generation = generation
        self._write_head()

    def _write_head(self) -> None:
        data_offset, slab_bytes, slabs = _numbers(self._geometry)
        _FILE.pack_into(
            self.view,
            0,
            _MAGIC,
            _FORMAT,
            slabs,
            self.num_bytes,
            slab_bytes,
            data_offset,
            self._tag,
            self.epoch,
            self.next_generation,
        )

    # -- SlabSpace ------------------------------------------------------------------------

    @property
    def geometry(self) -> ArenaGeometry:
        """Where the slabs lie."""
        return self._geometry

    def assign(self, slab: int, shape: BlockShape) -> bool:
        """Back a slab with memory and note its layout; False if the machine has none left."""
        start = self._geometry.data_offset + slab * self._geometry.slab_bytes
        try:
            # Without this a write to a full tmpfs kills the writer with SIGBUS.
            os.posix_fallocate(self._fd, start, self._geometry.slab_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            logger.warning("arena-memory-exhausted", extra={"fields": {"slab": slab}})
            return False
        entry = (shape.kv_root, shape.block_bytes, shape.block_size, shape.layout_version, 1)
        _SLAB.pack_into(self.view, _TABLE_AT + slab * _SLAB_ENTRY, *entry)
        return True

    def withdraw(self, slab: int) -> None:
        """Note that a slab has no layout."""
        _SLAB.pack_into(self.view, _TABLE_AT + slab * _SLAB_ENTRY, bytes(16), 0, 0, 0, 0)

    # -- slots ----------------------------------------------------------------------------

    def mark_writing(self, slots: Iterable[Slot]) -> None:
        """Take reserved slots away from their former content and remember the generations."""
        for slot in slots:
            arena.mark_writing(self.view, slot.offset, slot.generation)
            self.next_generation = max(self.next_generation, slot.generation + 1)
        self._write_head()

    def recover(self) -> Iterator[RecoveredSlab]:
        """Yield slabs left by an earlier process; reads and hashes every block once."""
        for slab in range(self._geometry.num_slabs):
            root, block_bytes, block_size, version, is_used = _SLAB.unpack_from(
                self.view, _TABLE_AT + slab * _SLAB_ENTRY
            )
            shape = BlockShape(root, version, block_size, block_bytes)
            if not is_used:
                continue
            is_sound = version == LAYOUT_VERSION and block_bytes > 0 and block_size > 0
            blocks = tuple(self._recover_blocks(slab, shape)) if is_sound else ()
            unfinished = tuple(self._unfinished(slab, shape)) if is_sound else ()
            if blocks or unfinished:
                yield RecoveredSlab(slab, shape, blocks, unfinished)
            else:
                self.withdraw(slab)

    def _recover_blocks(self, slab: int, shape: BlockShape) -> Iterator[WrittenBlock]:
        for offset in self._geometry.slot_offsets(slab, shape.block_bytes):
            header = arena.read_header(self.view, offset)
            if header is None or header.kv_root not in (shape.kv_root, bytes(16)):
                continue
            self.next_generation = max(self.next_generation, header.generation + 1)
            if (
                header.state == arena.STATE_READY
                and header.layout_version == LAYOUT_VERSION
                and header.kv_root == shape.kv_root
                and header.length == shape.block_bytes
                and 0 < header.num_tokens <= shape.block_size
                and _hash(self.view, offset, header.length) == header.checksum
            ):
                yield WrittenBlock(
                    header.key,
                    Slot(offset, header.generation),
                    header.checksum,
                    header.num_tokens,
                    header.is_request_scoped,
                )

    def _unfinished(self, slab: int, shape: BlockShape) -> Iterator[int]:
        for offset in self._geometry.slot_offsets(slab, shape.block_bytes):
            header = arena.read_header(self.view, offset)
            if header is not None and header.state == arena.STATE_WRITING:
                yield offset

    def close(self, *, keep: bool) -> None:
        """Unmap, and unlink unless `keep`; calling it twice is no error."""
        if self._fd < 0:
            return
        if not keep:
            os.unlink(self.path)
        self.view.release()
        self._map.close()
        os.close(self._fd)
        self._fd = -1


def _hash(view: memoryview, offset: int, length: int) -> int:
    return xxh3_64_intdigest(arena.payload(view, offset, length))


def _numbers(geometry: ArenaGeometry) -> tuple[int, int, int]:
    return geometry.data_offset, geometry.slab_bytes, geometry.num_slabs


def _tag(fleet: str, node_id: str) -> bytes:
    return blake2b(f"{fleet}\0{node_id}".encode(), digest_size=16).digest()


def _open_locked(path: str, num_bytes: int) -> int:
    """Return a locked descriptor of the file at `path`, empty if it is new."""
    deadline_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _lock(fd, path, deadline_s)
            if not _is_at(fd, path):
                os.close(fd)
                continue
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise PermissionError(f"{path} is not a file of this user")
            os.fchmod(fd, 0o600)
            if found.st_size in (0, num_bytes):
                return fd
            logger.info("arena-discarded", extra={"fields": {"bytes": found.st_size}})
            os.unlink(path)
            os.close(fd)
        except BaseException:
            _close_quietly(fd)
            raise


def _lock(fd: int, path: str, deadline_s: float) -> None:
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline_s:
                raise AlreadyExistsError(
                    f"{path} belongs to a running node", reason="arena-in-use"
                ) from error
            time.sleep(0.05)


def _is_at(fd: int, path: str) -> bool:
    """Tell whether the path still names the locked file (its owner may have unlinked it)."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _close_quietly(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        return
