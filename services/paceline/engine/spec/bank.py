"""Changes what draft models an engine drafts with, while it goes on.

    change      what is wanted from now on, complete
    (a thread)  reads and packs what is new, beside what is in use
    take_over   between two steps: pointers change, nothing is computed or allocated

Whatever goes wrong leaves everything as it is. The engine calls this file; versions.py holds
the versions of one drafter.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from paceline.domain.drafts import (
    MAX_DRAFTERS,
    MODEL_DRAFTER,
    DraftState,
    HeldDraft,
    StagedDraft,
)
from paceline.engine.models.config import UnsupportedModelError
from paceline.engine.spec.drafters.model import DraftModel, DraftModelOptions, load_draft_model
from paceline.engine.spec.drafters.versions import Staged, VersionedDrafter, stage
from paceline.engine.spec.growth import TreeBuilder
from paceline.engine.spec.speculator import Speculator
from paceline.engine.weights import load_tensors

logger = logging.getLogger(__name__)

MAX_VERSIONS = 4
"""Versions of one drafter at a time."""

_SWITCH_INTERVAL_S = 1e-4
"""How long the loading thread may keep Python from the engine's, which asks for it after each
kernel; Python's own 5 ms are several steps of a small model."""


class DraftBank:
    """Draft models in use, and those that are on their way."""

    def __init__(
        self,
        speculator: Speculator,
        *,
        target: Path,
        builder: TreeBuilder,
        options: DraftModelOptions,
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Change the models of a speculator; one thread calls all methods.

        Args:
            speculator: takes part in steps; may have a drafting model already.
            target: checkpoint that is drafted for.
            builder: the shape of trees.
            options: how draft models compute.
            clock_s: times what a step waits for.
        """
        self._speculator = speculator
        self._target, self._builder, self._options = target, builder, options
        self._clock_s = clock_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draft-loading")
        self._loading: Future[dict[str, Staged]] | None = None
        self._next: tuple[StagedDraft, ...] | None = None
        """Wanted since the loading began."""
        self._state = DraftState(held=self._held())

    @property
    def state(self) -> DraftState:
        """What is drafted with, as of the last change."""
        return self._state

    @property
    def is_loading(self) -> bool:
        """Whether a change is on its way."""
        return self._loading is not None

    @property
    def is_ready(self) -> bool:
        """Whether `take_over` has something to do."""
        return self._loading is not None and self._loading.done()

    def change(self, drafts: Sequence[StagedDraft]) -> None:
        """Want these drafts and no others. A change that was not taken over yet is dropped."""
        if self._loading is None:
            self._load(tuple(drafts))
        else:
            self._next = tuple(drafts)

    def take_over(self) -> DraftState | None:
        """Draft with what is ready from the next step on; None if it is wanted no more."""
        assert self._loading is not None
        started_s = self._clock_s()
        loaded, self._loading = self._loading, None
        # Giving back old weights and memory takes longer than all the rest: the thread does it.
        dropped: list[object] = [loaded, dict(self._staged())]
        error = loaded.exception()
        if self._next is not None:
            wanted, self._next = self._next, None
            self._load(wanted)
        elif error is None:
            self._swap(loaded.result())
        is_wanted, message = self._loading is None, _message(error)
        del loaded, error
        self._thread.submit(dropped.clear)
        if not is_wanted:
            return None
        if message:
            logger.warning("drafts-not-changed", extra={"fields": {"error": message}})
            self._state = replace(self._state, error=message)
        else:
            self._state = DraftState(
                held=self._held(),
                num_swaps=self._state.num_swaps + 1,
                max_swap_stall_s=max(self._clock_s() - started_s, self._state.max_swap_stall_s),
            )
        return self._state

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _load(self, drafts: tuple[StagedDraft, ...]) -> None:
        self._loading = self._thread.submit(self._prepare, drafts, dict(self._staged()))

    def _swap(self, staged: Mapping[str, Staged]) -> None:
        models: dict[str, VersionedDrafter] = {}
        renewed: set[str] = set()
        for name, versions in staged.items():
            drafter = self._models().get(name)
            if drafter is None:
                drafter = VersionedDrafter(
                    versions, builder=self._builder, options=self._options, name=name
                )
            else:
                before = drafter.versions
                drafter.take(versions)
                if drafter.versions != before:
                    renewed.add(name)
            models[name] = drafter
        self._speculator.change_models(models, renewed)

    def _models(self) -> dict[str, VersionedDrafter]:
        drafters = self._speculator.drafters.items()
        return {name: d for name, d in drafters if isinstance(d, VersionedDrafter)}

    def _staged(self) -> Iterator[tuple[str, Staged]]:
        return ((name, drafter.staged) for name, drafter in self._models().items())

    def _held(self) -> tuple[HeldDraft, ...]:
        return tuple(
            HeldDraft(name, version)
            for name, drafter in self._models().items()
            for version in drafter.versions
        )

    # -- in the thread --------------------------------------------------------------------

    def _prepare(
        self, drafts: tuple[StagedDraft, ...], held: Mapping[str, Staged]
    ) -> dict[str, Staged]:
        """Load what is not held yet.

        Raises:
            UnsupportedModelError: a draft cannot be used.
            ValueError: names, versions or shares cannot be.
        """
        check_drafts(drafts)
        staged: dict[str, Staged] = {}
        with _yielding():
            for name, group in groupby(drafts, key=lambda draft: draft.drafter):
                before = held.get(name)
                known = {} if before is None else {d.version: d for d, _ in before.drafts}
                loaded = [
                    (known.get(d.version) or self._loaded(d), d.share) for d in group if d.share > 0
                ]
                staged[name] = stage(loaded, self._options, before)
        return staged

    def _loaded(self, draft: StagedDraft) -> DraftModel:
        directory = Path(draft.directory)
        try:
            loaded = load_draft_model(directory, self._target, self._options, draft.version)
            check_finite(directory)
            return loaded
        except OSError as error:
            raise UnsupportedModelError(f"{draft.version}: {error}") from error


def check_drafts(drafts: Sequence[StagedDraft]) -> None:
    """Refuse what cannot be drafted with.

    Raises:
        ValueError: too many drafters or versions, a name that is not one, shares that do not
            add up to 1, or a drafter's versions that are not together.
    """
    groups = [(name, list(group)) for name, group in groupby(drafts, key=lambda d: d.drafter)]
    names = [name for name, _ in groups]
    if len(names) > MAX_DRAFTERS or len(set(names)) < len(names):
        raise ValueError(f"drafters {names}: expected at most {MAX_DRAFTERS}, each named once")
    for name, group in groups:
        bank, _, label = name.partition(":")
        is_named = bool(label) or ":" not in name
        if bank != MODEL_DRAFTER or not is_named or not set("+,").isdisjoint(name):
            raise ValueError(f"drafter {name!r}: expected {MODEL_DRAFTER} or {MODEL_DRAFTER}:NAME")
        versions = [draft.version for draft in group]
        if len(versions) > MAX_VERSIONS or len(set(versions)) < len(versions):
            raise ValueError(f"{name}: versions {versions}: expected at most {MAX_VERSIONS}")
        if not all(versions) or any("," in v or "+" in v for v in versions):
            raise ValueError(f"{name}: versions {versions}: not names")
        shares = [draft.share for draft in group]
        if not all(0.0 <= share <= 1.0 for share in shares) or not shares[0]:
            raise ValueError(f"{name}: shares {shares}: expected some for the first, none below 0")
        if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError(f"{name}: shares {shares}: expected a sum of 1")


def check_finite(directory: Path) -> None:
    """Refuse weights that are no numbers: every draft of theirs would be.

    Raises:
        UnsupportedModelError: a tensor has some; names it.
    """
    for name, tensor in load_tensors(directory):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UnsupportedModelError(f"tensor {name}: numbers that are not finite")


@contextmanager
def _yielding() -> Iterator[None]:
    """Let the engine's thread have Python soon after it asks."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _message(error: BaseException | None) -> str:
    return "" if error is None else str(error) or type(error).__name__
