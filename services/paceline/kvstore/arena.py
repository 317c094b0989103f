"""The bytes of a slot: header layout, and access to a mapped arena for those who only use slots.

    | header, 128 bytes | payload, padded to 64 bytes |

Stdlib and xxhash only, so that the engine's process can use `ArenaView` without gRPC or torch.
Which slots exist and who owns them is decided by the node (slots.py, store.py); the file
itself is created by arena_file.py.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from paceline.domain.blocks import LAYOUT_VERSION

MAGIC = b"PLKVBLK1"
HEADER_BYTES = 128
PAYLOAD_ALIGN = 64
"""One cache line, and the alignment of AVX-512 loads."""

STATE_EMPTY, STATE_WRITING, STATE_READY = 0, 1, 2
FLAG_REQUEST_SCOPED = 1

_HEADER = struct.Struct("<8sII16s16sQQQIII")
_STATE = struct.Struct("<I")
_STATE_AT = 12
_NO_KEY = bytes(16)


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """What the header of a slot says."""

    layout_version: int
    state: int
    key: bytes
    kv_root: bytes
    generation: int
    length: int
    checksum: int
    num_tokens: int
    flags: int

    @property
    def is_request_scoped(self) -> bool:
        """Whether the block belongs to one request only."""
        return bool(self.flags & FLAG_REQUEST_SCOPED)


def slot_bytes(block_bytes: int) -> int:
    """Return the bytes that a slot for `block_bytes` of payload takes."""
    return HEADER_BYTES + -(-block_bytes // PAYLOAD_ALIGN) * PAYLOAD_ALIGN


def write_header(view: memoryview, offset: int, header: SlotHeader) -> None:
    """Write a header so that its state becomes visible last."""
    _HEADER.pack_into(
        view,
        offset,
        MAGIC,
        header.layout_version,
        STATE_WRITING,
        header.key,
        header.kv_root,
        header.generation,
        header.length,
        header.checksum,
        header.num_tokens,
        header.flags,
        0,
    )
    _STATE.pack_into(view, offset + _STATE_AT, header.state)


def read_header(view: memoryview, offset: int) -> SlotHeader | None:
    """Return the header at `offset`, or None where there is none."""
    magic, version, state, key, root, generation, length, checksum, tokens, flags, _ = (
        _HEADER.unpack_from(view, offset)
    )
    if magic != MAGIC:
        return None
    return SlotHeader(version, state, key, root, generation, length, checksum, tokens, flags)


def mark_writing(view: memoryview, offset: int, generation: int) -> None:
    """Take a slot away from its former content: no reader trusts it from here on."""
    header = SlotHeader(LAYOUT_VERSION, STATE_WRITING, _NO_KEY, _NO_KEY, generation, 0, 0, 0, 0)
    write_header(view, offset, header)


def payload(view: memoryview, offset: int, length: int) -> memoryview:
    """Return the payload bytes of the slot at `offset`.

    Raises:
        ValueError: the range is not inside the arena.
    """
    start = offset + HEADER_BYTES
    if offset < 0 or length < 0 or start + length > len(view):
        raise ValueError("slot outside of the arena")
    return view[start : start + length]


def write_block(
    view: memoryview,
    offset: int,
    *,
    generation: int,
    key: bytes,
    kv_root: bytes,
    num_tokens: int,
    data: bytes | bytearray | memoryview,
    is_request_scoped: bool = False,
) -> int:
    """Copy `data` into a slot and seal it; return the xxh3-64 of what now lies there."""
    payload(view, offset, len(data))[:] = data
    return seal(
        view,
        offset,
        generation=generation,
        key=key,
        kv_root=kv_root,
        length=len(data),
        num_tokens=num_tokens,
        is_request_scoped=is_request_scoped,
    )


def seal(
    view: memoryview,
    offset: int,
    *,
    generation: int,
    key: bytes,
    kv_root: bytes,
    length: int,
    num_tokens: int,
    is_request_scoped: bool,
) -> int:
    """Hash the payload in place, write the ready header, return the xxh3-64."""
    checksum = xxh3_64_intdigest(payload(view, offset, length))
    flags = FLAG_REQUEST_SCOPED if is_request_scoped else 0
    header = SlotHeader(
        LAYOUT_VERSION,
        STATE_READY,
        key,
        kv_root,
        generation,
        length,
        checksum,
        num_tokens,
        flags,
    )
    write_header(view, offset, header)
    return checksum


def verify(
    view: memoryview,
    offset: int,
    *,
    generation: int,
    key: bytes,
    kv_root: bytes,
    length: int,
    checksum: int,
    data: bytes | memoryview,
) -> bool:
    """Tell whether the slot holds exactly that block and `data` is what was written.

    `data` is the reader's copy: it must be made before this call, since a writer may take
    the slot over at any time after a pin's lease has ended.
    """
    header = read_header(view, offset)
    return (
        header is not None
        and header.state == STATE_READY
        and header.layout_version == LAYOUT_VERSION
        and header.generation == generation
        and header.key == key
        and header.kv_root == kv_root
        and header.length == length == len(data)
        and header.checksum == checksum
        and xxh3_64_intdigest(data) == checksum
    )


class ArenaView:
    """A mapped arena file of a node on this machine, for reading and writing slots.

    Holds one file descriptor until `close`. Not thread-safe beyond what disjoint slots are.
    """

    def __init__(self, path: str, num_bytes: int) -> None:
        """Map the file.

        Raises:
            OSError: it cannot be opened, or is not `num_bytes` long.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = os.fstat(fd).st_size
            if size != num_bytes or size == 0:
                raise OSError(f"arena file has {size} bytes instead of {num_bytes}")
            self._map = mmap.mmap(fd, num_bytes)
        finally:
            os.close(fd)
        self._view = memoryview(self._map)

    def payload(self, offset: int, length: int) -> memoryview:
        """Return the writable payload bytes of the slot at `offset`; release it before `close`.

        Raises:
            ValueError: the range is not inside the arena.
        """
        return payload(self._view, offset, length)

    def header(self, offset: int) -> SlotHeader | None:
        """Return the header at `offset`, or None where there is none."""
        return read_header(self._view, offset)

    def seal(
        self,
        offset: int,
        *,
        generation: int,
        key: bytes,
        kv_root: bytes,
        length: int,
        num_tokens: int,
        is_request_scoped: bool,
    ) -> int:
        """Write the ready header of a filled slot and return the payload's xxh3-64."""
        return seal(
            self._view,
            offset,
            generation=generation,
            key=key,
            kv_root=kv_root,
            length=length,
            num_tokens=num_tokens,
            is_request_scoped=is_request_scoped,
        )

    def check(
        self,
        offset: int,
        *,
        generation: int,
        key: bytes,
        kv_root: bytes,
        length: int,
        checksum: int,
        data: bytes | memoryview,
    ) -> bool:
        """Tell whether the slot still holds that block and the copy `data` is what was written."""
        return verify(
            self._view,
            offset,
            generation=generation,
            key=key,
            kv_root=kv_root,
            length=length,
            checksum=checksum,
            data=data,
        )

    def close(self) -> None:
        """Unmap; views still held elsewhere keep the mapping until they go."""
        self._view.release()
        try:
            self._map.close()
        except BufferError:
            # A payload view is alive; the mapping is freed with it.
            return
