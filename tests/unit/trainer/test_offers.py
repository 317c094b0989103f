"""Checkpoints that operators hand in: whole ones are taken, others leave nothing behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from paceline.domain.draft_records import DraftStage
from paceline.rpc.channel import map_rpc_error
from paceline.trainer.desk import DraftStore
from paceline.v1.drafts_pb2 import FetchDraftRequest, OfferDraftRequest
from tests.unit.trainer.rig import OFFER_BYTES, Rig, trainer_rig
from tests.unit.trainer.small_drafts import make_draft
from tests.waiting import until


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with trainer_rig(tmp_path) as running:
        yield running


def pieces_of(directory: Path, **first: Any) -> list[OfferDraftRequest]:
    pieces = [OfferDraftRequest(**first)]
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        half = len(data) // 2
        pieces += [OfferDraftRequest(file=path.name, data=d) for d in (data[:half], data[half:])]
    return pieces


async def offer(rig: Rig, pieces: list[OfferDraftRequest]) -> Any:
    return (await rig.stub.OfferDraft(iter(pieces), timeout=10)).draft


async def refusal(rig: Rig, pieces: list[OfferDraftRequest]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await offer(rig, pieces)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert list(rig.incoming.iterdir()) == []
    assert len(rig.registry.records()) == 1
    return map_rpc_error(caught.value).reason


async def fetched(rig: Rig, version: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    async for piece in rig.stub.FetchDraft(FetchDraftRequest(version=version), timeout=10):
        files[piece.file] = files.get(piece.file, b"") + piece.data
    return files


async def test_what_was_offered_can_be_fetched(rig: Rig, tmp_path: Path) -> None:
    directory = make_draft(tmp_path / "draft", 1, num_floats=12_000)
    record = await offer(rig, pieces_of(directory))
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert record.version == record.digest[:12] == rig.registry.get(record.version).version
    assert await fetched(rig, record.version) == files
    assert list(rig.incoming.iterdir()) == []


async def test_only_a_forced_offer_goes_on_trial_at_once(rig: Rig, tmp_path: Path) -> None:
    asked = await offer(rig, pieces_of(make_draft(tmp_path / "a", 1)))
    active = rig.registry.active()
    assert active is not None and active.is_floor and asked.version != active.version
    forced = await offer(rig, pieces_of(make_draft(tmp_path / "b", 2), is_forced=True))
    active, trial = rig.registry.active(), rig.registry.canary()
    assert active is not None and active.is_floor
    assert trial is not None and trial.version == forced.version


@pytest.mark.parametrize(
    "name",
    [
        *("../config.json", "/etc/passwd", "a/model.safetensors", "..", ".safetensors"),
        *("pytorch.bin", "model.pt", "run.py", "a\\b.safetensors", "a\0.safetensors"),
        "x" * 200 + ".safetensors",
    ],
)
async def test_files_that_no_draft_has_are_refused(rig: Rig, tmp_path: Path, name: str) -> None:
    pieces = pieces_of(make_draft(tmp_path / "draft", 1))
    pieces.insert(2, OfferDraftRequest(file=name, data=b"x"))
    assert await refusal(rig, pieces) == "bad-file"
    assert not (rig.incoming.parent / "config.json").exists()


async def test_more_than_the_bound_is_refused(rig: Rig, tmp_path: Path) -> None:
    directory = make_draft(tmp_path / "draft", 1, num_floats=OFFER_BYTES)
    assert await refusal(rig, pieces_of(directory)) == "draft-too-large"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "end", "all"])
async def test_half_a_checkpoint_is_refused(rig: Rig, tmp_path: Path, missing: str) -> None:
    pieces = pieces_of(make_draft(tmp_path / "draft", 1))
    if missing == "end":
        weights = [p for p in pieces if p.file == "model.safetensors"]
        pieces.remove(weights[-1])
    elif missing == "all":
        pieces = pieces[:1]
    else:
        pieces = [piece for piece in pieces if piece.file != missing]
    assert await refusal(rig, pieces) == "not-a-draft"


@pytest.mark.parametrize(
    "header",
    [
        *(b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x04\0\0\0\0\0\0\0{{{{"),
        (10).to_bytes(8, "little") + b'{"a": "b"}',
    ],
)
async def test_what_is_no_safetensors_is_refused(rig: Rig, tmp_path: Path, header: bytes) -> None:
    directory = make_draft(tmp_path / "draft", 1)
    (directory / "model.safetensors").write_bytes(header)
    assert await refusal(rig, pieces_of(directory)) == "not-a-draft"


async def test_a_file_may_come_once(rig: Rig, tmp_path: Path) -> None:
    pieces = pieces_of(make_draft(tmp_path / "draft", 1))
    pieces.append(OfferDraftRequest(file="config.json", data=b"{}"))
    assert await refusal(rig, pieces) == "bad-file"


async def test_an_offer_whose_operator_left_leaves_nothing(rig: Rig, tmp_path: Path) -> None:
    pieces = pieces_of(make_draft(tmp_path / "draft", 1))
    call = rig.stub.OfferDraft()
    for piece in pieces[:-1]:
        await call.write(piece)
    await until(lambda: list(rig.incoming.iterdir()))
    call.cancel()
    await until(lambda: not list(rig.incoming.iterdir()))
    assert len(rig.registry.records()) == 1


async def test_few_are_taken_in_at_a_time(rig: Rig, tmp_path: Path) -> None:
    calls = [rig.stub.OfferDraft() for _ in range(2)]
    for call in calls:
        await call.write(OfferDraftRequest(file="config.json", data=b"{}"))
    await until(lambda: len(list(rig.incoming.iterdir())) == 2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await offer(rig, pieces_of(make_draft(tmp_path / "draft", 1)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for call in calls:
        call.cancel()
    await until(lambda: not list(rig.incoming.iterdir()))


async def test_an_unknown_version_is_not_found(rig: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fetched(rig, "0" * 12)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert map_rpc_error(caught.value).reason == "draft-not-found"


async def test_a_change_is_published_also_if_its_caller_leaves(rig: Rig, tmp_path: Path) -> None:
    directory = make_draft(tmp_path / "draft", 1)

    def take(store: DraftStore) -> None:
        record = store.add(directory, drafter="model", parent="", num_samples=0, num_tokens=0)
        store.decide(record.version, DraftStage.ACTIVE, "test")

    task = asyncio.create_task(rig.desk.change(take))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await rig.desk.close()
    assert rig.attendants.plan is not None
    config = json.loads((directory / "config.json").read_text())
    active = rig.registry.files(rig.attendants.plan[0].active.version)
    shown = next(path for path in active if path.name == "config.json")
    assert json.loads(shown.read_text()) == config
