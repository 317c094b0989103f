"""Fetched drafts on the disk: only those whose bytes are right, within a bound."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from paceline.domain.drafts import DraftFile
from paceline.engine.checkpoint_files import model_digest
from paceline.worker.draft_files import DraftCache, DraftRefusedError
from tests.unit.trainer.small_drafts import make_draft


def file_of(directory: Path) -> DraftFile:
    digest = model_digest(directory)
    size = sum(path.stat().st_size for path in directory.iterdir())
    return DraftFile(digest[:12], digest, size)


def take(cache: DraftCache, directory: Path, file: DraftFile | None = None) -> Path:
    incoming = cache.open(file or file_of(directory))
    try:
        for path in sorted(directory.iterdir()):
            data = path.read_bytes()
            incoming.write(path.name, data[:100])
            incoming.write(path.name, data[100:])
        return incoming.finish()
    finally:
        incoming.remove()


def test_a_version_comes_back_byte_by_byte(tmp_path: Path) -> None:
    cache, draft = DraftCache(tmp_path / "cache", 1 << 20), make_draft(tmp_path / "draft", 1)
    file = file_of(draft)
    assert cache.find(file) is None
    place = take(cache, draft)
    assert place == cache.find(file) == tmp_path / "cache" / file.version
    assert {p.name: p.read_bytes() for p in place.iterdir()} == {
        p.name: p.read_bytes() for p in draft.iterdir()
    }
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0
    assert place.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_flipped_bit_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    cache, draft = DraftCache(tmp_path / "cache", 1 << 20), make_draft(tmp_path / "draft", 1)
    file, path = file_of(draft), draft / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DraftRefusedError) as caught:
        take(cache, draft, file)
    assert caught.value.reason in ("wrong-digest", "not-a-draft")
    assert os.listdir(tmp_path / "cache") == []


def test_a_version_that_rots_is_removed_when_it_is_asked_for(tmp_path: Path) -> None:
    cache, draft = DraftCache(tmp_path / "cache", 1 << 20), make_draft(tmp_path / "draft", 1)
    place = take(cache, draft)
    with open(place / "model.safetensors", "r+b") as out:
        out.seek(-4, os.SEEK_END)
        out.write(b"rot!")
    assert cache.find(file_of(draft)) is None
    assert not place.exists()
    assert take(cache, draft) == place


def test_what_is_not_announced_is_refused(tmp_path: Path) -> None:
    cache, draft = DraftCache(tmp_path / "cache", 1 << 20), make_draft(tmp_path / "draft", 1)
    file = file_of(draft)
    other = "0" * 12
    for bad, reason in (
        (replace(file, num_bytes=file.num_bytes - 1), "too-large"),
        (replace(file, num_bytes=(1 << 20) + 1), "too-large"),
        (replace(file, version="../../../etc"), "bad-version"),
        (replace(file, version=other), "bad-version"),
        (replace(file, digest=file.version + "f" * 52), "wrong-digest"),
    ):
        with pytest.raises(DraftRefusedError) as caught:
            take(cache, draft, bad)
        assert caught.value.reason == reason
    incoming = cache.open(file)
    for name in ("../config.json", "evil.py", ""):
        with pytest.raises(DraftRefusedError):
            incoming.write(name, b"x")
    incoming.remove()
    assert os.listdir(tmp_path / "cache") == []
    assert sorted(os.listdir(tmp_path)) == ["cache", "draft"]


def test_two_workers_may_fetch_the_same_version(tmp_path: Path) -> None:
    draft = make_draft(tmp_path / "draft", 1)
    file = file_of(draft)
    caches = [DraftCache(tmp_path / "cache", 1 << 20) for _ in range(2)]
    incoming = [cache.open(file) for cache in caches]
    for path in sorted(draft.iterdir()):
        for each in incoming:
            each.write(path.name, path.read_bytes())
    places = [each.finish() for each in incoming]
    for each in incoming:
        each.remove()
    assert places[0] == places[1]
    assert os.listdir(tmp_path / "cache") == [file.version]


def test_beyond_the_bound_the_longest_unused_go_but_none_in_use(tmp_path: Path) -> None:
    drafts = [make_draft(tmp_path / f"draft-{i}", i) for i in range(4)]
    files = [file_of(draft) for draft in drafts]
    cache = DraftCache(tmp_path / "cache", 2 * files[0].num_bytes + 100)
    for age, draft in enumerate(drafts):
        os.utime(take(cache, draft), (age, age))
    cache.make_room({files[0].version})
    left = {name for name in os.listdir(tmp_path / "cache")}
    assert left == {files[0].version, files[3].version}
