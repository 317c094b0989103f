"""Slot headers, views of an arena, and the arena file."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from paceline.domain.blocks import LAYOUT_VERSION
from paceline.domain.errors import AlreadyExistsError
from paceline.kvstore import arena
from paceline.kvstore.arena import ArenaView
from paceline.kvstore.arena_file import ArenaFile, plan_geometry
from paceline.kvstore.values import BlockShape, Slot

MIB = 1024 * 1024
KEY, ROOT = bytes(range(16)), bytes(range(16, 32))
SHAPE = BlockShape(ROOT, LAYOUT_VERSION, 16, 1000)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[ArenaFile]:
    """Return a fresh arena of 4 MiB with one slab in use."""
    file = ArenaFile(str(tmp_path), "test", "kv-0", 4 * MIB)
    assert file.assign(0, SHAPE)
    yield file
    file.close(keep=False)


def write(file: ArenaFile, offset: int, generation: int, data: bytes) -> int:
    """Write a block under KEY."""
    return arena.write_block(
        file.view, offset, generation=generation, key=KEY, kv_root=ROOT, num_tokens=7, data=data
    )


def test_the_header_is_laid_out_as_agreed(file: ArenaFile) -> None:
    offset = next(file.geometry.slot_offsets(0, 1000))
    data = os.urandom(1000)
    checksum = write(file, offset, 42, data)
    raw = bytes(file.view[offset : offset + 128])
    fields = struct.unpack("<8sII16s16sQQQIII", raw[:84])
    assert fields == (b"PLKVBLK1", 1, 2, KEY, ROOT, 42, 1000, xxh3_64_intdigest(data), 7, 0, 0)
    assert checksum == xxh3_64_intdigest(data)
    assert bytes(file.view[offset + 128 : offset + 1128]) == data


def test_slots_are_aligned_and_do_not_overlap(file: ArenaFile) -> None:
    offsets = list(file.geometry.slot_offsets(0, 1000))
    assert all(offset % 64 == 0 for offset in offsets)
    steps = {b - a for a, b in pairwise(offsets)}
    assert steps == {128 + 1024}
    assert offsets[-1] + 1152 <= file.geometry.data_offset + file.geometry.slab_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 2},
        {"key": bytes(16)},
        {"kv_root": bytes(16)},
        {"checksum": 1},
        {"length": 999},
        {"data": bytes(1000)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_check_refuses_any_difference(file: ArenaFile, change: dict[str, object]) -> None:
    offset = next(file.geometry.slot_offsets(0, 1000))
    data = os.urandom(1000)
    checksum = write(file, offset, 1, data)
    good: dict[str, object] = {
        "generation": 1,
        "key": KEY,
        "kv_root": ROOT,
        "length": 1000,
        "checksum": checksum,
        "data": memoryview(data),
    }
    view = ArenaView(file.path, file.num_bytes)
    assert view.check(offset, **good)  # type: ignore[arg-type]
    assert not view.check(offset, **(good | change))  # type: ignore[arg-type]
    file.mark_writing([Slot(offset, 2)])
    assert not view.check(offset, **good), "a slot that is written anew"  # type: ignore[arg-type]
    view.close()


def test_a_view_refuses_ranges_outside(file: ArenaFile) -> None:
    view = ArenaView(file.path, file.num_bytes)
    for offset, length in ((4 * MIB, 1), (4 * MIB - 128, 1), (-1, 1), (0, 4 * MIB)):
        with pytest.raises(ValueError, match="outside"):
            view.payload(offset, length)
    view.close()


def test_a_view_closes_while_a_payload_is_still_held(file: ArenaFile) -> None:
    view = ArenaView(file.path, file.num_bytes)
    held = view.payload(file.geometry.data_offset, 100)
    view.close()
    assert len(bytes(held)) == 100


def test_a_view_of_another_size_or_place_is_an_os_error(file: ArenaFile, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="instead of"):
        ArenaView(file.path, 2 * MIB)
    with pytest.raises(OSError):
        ArenaView(str(tmp_path / "nothing"), MIB)
    link = tmp_path / "link"
    link.symlink_to(file.path)
    with pytest.raises(OSError):
        ArenaView(str(link), file.num_bytes)


def test_recovery_finds_sealed_slots_and_rests_unfinished_ones(tmp_path: Path) -> None:
    first = ArenaFile(str(tmp_path), "test", "kv-0", 4 * MIB)
    first.assign(3, SHAPE)
    offsets = list(first.geometry.slot_offsets(3, 1000))
    first.mark_writing([Slot(offset, 5 + i) for i, offset in enumerate(offsets[:3])])
    checksum = write(first, offsets[1], 6, b"x" * 1000)
    epoch = first.epoch
    first.close(keep=True)

    second = ArenaFile(str(tmp_path), "test", "kv-0", 4 * MIB)
    (slab,) = second.recover()
    assert (slab.slab, slab.shape) == (3, SHAPE)
    (block,) = slab.blocks
    assert (block.key, block.slot, block.checksum) == (KEY, Slot(offsets[1], 6), checksum)
    assert slab.unfinished == (offsets[0], offsets[2])
    assert second.epoch == epoch + 1
    assert second.next_generation == 8
    second.close(keep=False)
    assert list(tmp_path.iterdir()) == []


def test_a_locked_file_is_not_opened_twice(file: ArenaFile, tmp_path: Path) -> None:
    with pytest.raises(AlreadyExistsError):
        ArenaFile(str(tmp_path), "test", "kv-0", 4 * MIB)
    other = ArenaFile(str(tmp_path), "test", "kv-1", 4 * MIB)
    other.close(keep=False)


def test_an_old_mapping_survives_a_discarded_file(tmp_path: Path) -> None:
    old = ArenaFile(str(tmp_path), "test", "kv-0", 8 * MIB)
    old.assign(0, SHAPE)
    view = ArenaView(old.path, old.num_bytes)
    offset = next(old.geometry.slot_offsets(0, 1000))
    old.close(keep=True)
    new = ArenaFile(str(tmp_path), "test", "kv-0", 4 * MIB)
    view.payload(offset, 1000)[:] = b"y" * 1000
    assert list(new.recover()) == []
    view.close()
    new.close(keep=False)


def test_a_full_filesystem_is_no_memory_not_a_crash(
    file: ArenaFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    assert not file.assign(1, SHAPE)


@pytest.mark.parametrize("num_bytes", [MIB, 4 * MIB, 256 * MIB, 64 * 1024 * MIB])
def test_slabs_fill_the_arena(num_bytes: int) -> None:
    geometry = plan_geometry(num_bytes)
    end = geometry.data_offset + geometry.num_slabs * geometry.slab_bytes
    assert geometry.num_slabs >= 3
    assert num_bytes - geometry.slab_bytes - 4096 < end <= num_bytes


def test_the_engines_side_needs_neither_grpc_nor_redis_nor_torch() -> None:
    code = (
        "import sys, paceline.kvstore.arena;"
        "sys.exit(any(m in sys.modules for m in ('grpc', 'redis', 'torch', 'google.protobuf')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
