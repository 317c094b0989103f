"""Versions of a drafter: who drafts with which, and what becomes of the KV when one leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from paceline.engine import kernels
from paceline.engine.spec.builders import branching
from paceline.engine.spec.drafters.draft_kv import DraftKv
from paceline.engine.spec.drafters.model import (
    DraftModel,
    DraftModelOptions,
    ModelDrafter,
    load_draft_model,
)
from paceline.engine.spec.drafters.versions import VersionedDrafter, stage
from paceline.engine.spec.tree import DraftTree
from tests.checkpoints import random_checkpoint
from tests.unit.engine.spec.drafting import budget, context, generated, prompt

F32 = DraftModelOptions(weight_format="f32")
RECOMPUTES = DraftModelOptions(weight_format="f32", keeps_kv=False)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("versions")
    return {
        "v1": random_checkpoint("llama", root / "v1"),
        "v2": random_checkpoint("llama", root / "v2", seed=1),
        "deeper": random_checkpoint("llama", root / "deeper", seed=2, num_hidden_layers=5),
    }


@cache
def model(directory: Path) -> DraftModel:
    return load_draft_model(directory, directory, F32, version=directory.name)


def drafter(
    *shares: tuple[Path, float], options: DraftModelOptions = F32, name: str = "model"
) -> VersionedDrafter:
    staged = stage([(model(directory), share) for directory, share in shares], options)
    return VersionedDrafter(staged, builder=branching(1), options=options, name=name)


def take(
    drafts: VersionedDrafter, *shares: tuple[Path, float], options: DraftModelOptions = F32
) -> None:
    versions = [(model(directory), share) for directory, share in shares]
    drafts.take(stage(versions, options, drafts.staged))


def propose(drafts: VersionedDrafter, sequence_id: int, tokens: Sequence[int]) -> DraftTree:
    return drafts.propose([context(sequence_id, tokens)], [budget(4, 4)])[0]


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_shares_of_sequences_are_as_asked_for(checkpoints: dict[str, Path], share: float) -> None:
    count = 2000
    drafts = drafter((checkpoints["v1"], 1 - share), (checkpoints["v2"], share))
    drafts.propose([context(i, [5]) for i in range(count)], [budget(1, 1)] * count)
    on_trial = sum(drafts.version_of(i) == "v2" for i in range(count))
    assert abs(on_trial - share * count) < 5 * math.sqrt(count * share * (1 - share))
    again = drafter((checkpoints["v1"], 1 - share), (checkpoints["v2"], share))
    again.propose([context(i, [5]) for i in range(100)], [budget(1, 1)] * 100)
    assert [again.version_of(i) for i in range(100)] == [drafts.version_of(i) for i in range(100)]
    other = drafter((checkpoints["v1"], 0.5), (checkpoints["v2"], 0.5), name="model:code")
    other.propose([context(i, [5]) for i in range(100)], [budget(1, 1)] * 100)
    assert {other.version_of(i) for i in range(100)} == {"v1", "v2"}


def test_each_sequence_gets_the_drafts_of_its_version(checkpoints: dict[str, Path]) -> None:
    drafts = drafter((checkpoints["v1"], 0.5), (checkpoints["v2"], 0.5))
    texts = {i: prompt(20, seed=i) for i in range(8)}
    trees = drafts.propose([context(i, t) for i, t in texts.items()], [budget(4, 4)] * 8)
    versions = [drafts.version_of(i) for i in texts]
    assert set(versions) == {"v1", "v2"} == set(drafts.versions)
    for version, text, tree in zip(versions, texts.values(), trees, strict=True):
        assert list(tree.tokens) == generated(checkpoints[version], text, 4)
        assert set(tree.sources) == {"model"}


def test_a_sequence_keeps_its_version_until_that_leaves(checkpoints: dict[str, Path]) -> None:
    v1, v2 = checkpoints["v1"], checkpoints["v2"]
    drafts, text = drafter((v1, 1.0)), prompt(20)
    propose(drafts, 1, text)
    take(drafts, (v2, 0.9), (v1, 0.1))
    assert (drafts.version, drafts.version_of(1)) == ("v2", "v1")
    assert list(propose(drafts, 1, text).tokens) == generated(v1, text, 4)
    take(drafts, (v2, 1.0))
    propose(drafts, 1, text)
    take(drafts, (v1, 0.9), (v2, 0.1))
    assert drafts.version_of(1) == "v2", "it moved, and stays"


@pytest.mark.skipif(not kernels.has_cpp_kernels(), reason="torch's numbers move with the batch")
def test_kv_of_the_version_before_is_kept_or_computed_again(
    checkpoints: dict[str, Path],
) -> None:
    v1, v2, text = checkpoints["v1"], checkpoints["v2"], prompt(40)
    # The same by hand: v2 goes on in the pages of v1.
    kv = DraftKv(model(v1).kv_shape, 1 << 20)
    ModelDrafter(model(v1), kv, builder=branching(1)).propose([context(1, text)], [budget(4, 4)])
    mixed = ModelDrafter(model(v2), kv, builder=branching(1)).propose(
        [context(1, text)], [budget(4, 4)]
    )[0]
    fresh = propose(drafter((v2, 1.0)), 1, text)
    assert list(fresh.tokens) == generated(v2, text, 4)
    assert mixed.confidences != fresh.confidences
    for options, expected in ((F32, mixed), (RECOMPUTES, fresh)):
        drafts = drafter((v1, 1.0), options=options)
        propose(drafts, 1, text)
        take(drafts, (v2, 1.0), options=options)
        assert propose(drafts, 1, text) == expected
        assert propose(drafts, 1, text) == expected, "computed again once only"


def test_other_shapes_share_the_memory_and_start_from_nothing(
    checkpoints: dict[str, Path],
) -> None:
    v1, deeper, text = checkpoints["v1"], checkpoints["deeper"], prompt(40)
    drafts = drafter((v1, 1.0))
    limit = F32.kv_memory_mb << 20
    assert sum(kv.num_bytes for kv in drafts.staged.kvs) <= limit
    propose(drafts, 1, text)
    before = drafts.staged.kvs
    take(drafts, (deeper, 0.5), (v1, 0.5))
    assert len(drafts.staged.kvs) == 2
    assert sum(kv.num_bytes for kv in drafts.staged.kvs) <= limit
    assert not set(before) & set(drafts.staged.kvs) and drafts.state_entries == 0
    assert list(propose(drafts, 1, text).tokens) == generated(v1, text, 4)
    take(drafts, (deeper, 1.0))
    assert list(propose(drafts, 1, text).tokens) == generated(deeper, text, 4)
    assert drafts.state_bytes == drafts.state_entries * model(deeper).kv_shape.page_bytes > 0
    drafts.forget(1)
    drafts.forget(1)
    assert drafts.state_entries == 0


def test_versions_of_one_shape_share_pages(checkpoints: dict[str, Path]) -> None:
    drafts = drafter((checkpoints["v1"], 0.5), (checkpoints["v2"], 0.5))
    kv = drafts.staged.kvs
    assert len(kv) == 1 and kv[0].num_bytes <= F32.kv_memory_mb << 20
    take(drafts, (checkpoints["v2"], 1.0))
    assert drafts.staged.kvs == kv


def test_too_little_memory_for_two_shapes_is_refused(checkpoints: dict[str, Path]) -> None:
    drafts = [(model(checkpoints["v1"]), 0.5), (model(checkpoints["deeper"]), 0.5)]
    page = max(draft.kv_shape.page_bytes for draft, _ in drafts)
    assert page < 1 << 19
    with pytest.raises(ValueError, match="not one page"):
        stage(drafts, DraftModelOptions(kv_memory_mb=0))
