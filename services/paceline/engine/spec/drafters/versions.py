"""A drafter with several versions of its weights at a time, each for a share of the sequences.

A sequence is given a version when it first drafts and keeps it until that version leaves; then
it goes on with the active one, the first. Versions of one shape share their KV, so that what a
sequence had computed serves the next version too: of the demo model's draft, KV of the version
before cost no acceptance that could be measured.

bank.py makes what `take` takes, beside the running engine; nothing here reads files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from paceline.domain.drafts import MODEL_DRAFTER
from paceline.engine.spec.drafter import NO_NEEDS, DraftBudget, DraftContext, Round
from paceline.engine.spec.drafters.draft_kv import DraftKv, KvShape
from paceline.engine.spec.drafters.model import (
    DraftModel,
    DraftModelOptions,
    ModelDrafter,
    load_draft_model,
)
from paceline.engine.spec.growth import TreeBuilder
from paceline.engine.spec.tree import EMPTY_TREE, DraftTree

_USUAL = DraftModelOptions()


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """Versions that are ready to draft, and their KV."""

    drafts: tuple[tuple[DraftModel, float], ...]
    """With their shares, the active one first; at least one."""
    kvs: tuple[DraftKv, ...]
    """One for each shape among them."""


class VersionedDrafter:
    """Versions of one drafter, seen as one."""

    needs = NO_NEEDS

    def __init__(
        self,
        staged: Staged,
        *,
        builder: TreeBuilder,
        options: DraftModelOptions,
        name: str = MODEL_DRAFTER,
    ) -> None:
        self.name = name
        self._builder, self._options = builder, options
        self._version_of: dict[int, str] = {}
        """Of sequences that have drafted; it may have left meanwhile."""
        self.take(staged)

    @property
    def version(self) -> str:
        """The active version."""
        return self._active

    @property
    def versions(self) -> tuple[str, ...]:
        """All versions, the active one first."""
        return tuple(self._drafters)

    @property
    def staged(self) -> Staged:
        """What is drafted with."""
        return self._staged

    @property
    def state_bytes(self) -> int:
        """Memory of the KV that sequences hold."""
        return sum(kv.num_held_bytes for kv in self._staged.kvs)

    @property
    def state_entries(self) -> int:
        """Pages that sequences hold."""
        return sum(kv.num_held_pages for kv in self._staged.kvs)

    def take(self, staged: Staged) -> None:
        """Draft with these from now on. Moves pointers only, whatever the number of sequences."""
        kvs = {kv.shape: kv for kv in staged.kvs}
        catch_up = max(1, self._options.catch_up_tokens // len(staged.drafts))
        self._staged = staged
        self._active = staged.drafts[0][0].version
        self._drafters = {
            draft.version: ModelDrafter(
                draft,
                kvs[draft.kv_shape],
                builder=self._builder,
                name=self.name,
                catch_up_tokens=catch_up,
            )
            for draft, _ in staged.drafts
        }

    def version_of(self, sequence_id: int) -> str:
        """Return the version that a sequence drafts with."""
        version = self._version_of.get(sequence_id)
        return self._active if version not in self._drafters else version

    def propose(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> list[DraftTree]:
        """Let each sequence's version propose."""
        by_version: dict[str, list[int]] = {}
        for i, context in enumerate(contexts):
            by_version.setdefault(self._assigned(context.sequence_id), []).append(i)
        trees = [EMPTY_TREE] * len(contexts)
        for version, indices in by_version.items():
            grown = self._drafters[version].propose(
                [contexts[i] for i in indices], [budgets[i] for i in indices]
            )
            for i, tree in zip(indices, grown, strict=True):
                trees[i] = tree
        return trees

    def observe(self, rounds: Sequence[Round]) -> None:
        """Do nothing: the weights learn elsewhere."""

    def forget(self, sequence_id: int) -> None:
        """Free a sequence's pages."""
        if self._version_of.pop(sequence_id, None) is not None:
            for kv in self._staged.kvs:
                kv.pages.forget(sequence_id)

    def _assigned(self, sequence_id: int) -> str:
        version = self._version_of.get(sequence_id)
        if version is None:
            version = self._version_of[sequence_id] = self._drawn(sequence_id)
        elif version not in self._drafters:
            version = self._version_of[sequence_id] = self._active
            goes_on = self._drafters[version].kv if self._options.keeps_kv else None
            for kv in self._staged.kvs:
                if kv is not goes_on:
                    kv.pages.forget(sequence_id)
        return version

    def _drawn(self, sequence_id: int) -> str:
        """Return the version whose share a sequence falls into."""
        digest = blake3(f"{self.name}/{sequence_id}".encode()).digest(length=8)
        point, total = int.from_bytes(digest, "little") / 2**64, 0.0
        for draft, share in self._staged.drafts:
            total += share
            if point < total:
                return draft.version
        return self._active


def stage(
    drafts: Iterable[tuple[DraftModel, float]],
    options: DraftModelOptions,
    held: Staged | None = None,
) -> Staged:
    """Return versions with their KV, that of `held` where it has the same shape and size.

    Shapes share the drafter's memory evenly.

    Raises:
        ValueError: a shape's part is less than one page.
    """
    drafts = tuple(drafts)
    shapes: list[KvShape] = list(dict.fromkeys(draft.kv_shape for draft, _ in drafts))
    num_bytes = (options.kv_memory_mb << 20) // len(shapes)
    known = {} if held is None else {kv.shape: kv for kv in held.kvs}
    kvs = []
    for shape in shapes:
        kv = known.get(shape)
        if kv is None or kv.pages.num_pages != num_bytes // shape.page_bytes:
            kv = DraftKv(shape, num_bytes)
        kvs.append(kv)
    return Staged(drafts, tuple(kvs))


def make(
    *,
    directory: str | Path,
    target: str | Path,
    builder: TreeBuilder,
    options: DraftModelOptions = _USUAL,
    version: str | None = None,
) -> VersionedDrafter:
    """Return a drafter from a checkpoint.

    Raises:
        UnsupportedModelError: it cannot be loaded, or has another vocabulary than the target.
    """
    draft = load_draft_model(Path(directory), Path(target), options, version)
    return VersionedDrafter(stage([(draft, 1.0)], options), builder=builder, options=options)
