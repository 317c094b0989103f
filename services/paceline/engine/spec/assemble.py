"""Puts speculation together from an engine's options. build.py calls it.

A drafter takes part if it was named and has what it needs: "model" and "medusa" their weights.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.domain.cost import StepCost
from paceline.domain.drafts import MODEL_DRAFTER
from paceline.engine import kernels
from paceline.engine.options import EngineOptions
from paceline.engine.spec.builders import BUILDERS
from paceline.engine.spec.controller import Controller
from paceline.engine.spec.drafter import Drafter
from paceline.engine.spec.drafters import drafter_names, make_drafter
from paceline.engine.spec.drafters.union import UnionDrafter
from paceline.engine.spec.lent_target import LentTarget
from paceline.engine.spec.speculator import Speculation, Speculator

if TYPE_CHECKING:
    from paceline.engine.spec.bank import DraftBank
    from paceline.engine.spec.drafters.model import DraftModelOptions

VERIFIERS = ("coupled", "rejection")

_UNIONS = (("trie", "recycling"), ("trie", "model"), ("trie", "recycling", "model"))
"""Arms beside the drafters themselves, where all parts take part: what looks things up costs
next to nothing beside a model, and knows other things."""

_BANK_UNION = ("trie", "recycling")
"""What each further model of a bank has its one union with."""

_SEED = 0
"""Of the controller: what it explores need not differ between two runs."""


def check_options(options: EngineOptions) -> None:
    """Refuse what cannot be.

    Raises:
        ValueError: an option is out of range, or names what there is not.
    """
    parts = [part for name in options.drafters for part in name.split("+")]
    unknown = sorted(set(parts) - set(drafter_names()))
    if unknown:
        raise ValueError(f"drafters {unknown}: known are {', '.join(drafter_names())}")
    for name, value, known in (
        ("draft_builder", options.draft_builder, tuple(BUILDERS)),
        ("verifier", options.verifier, VERIFIERS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r}: expected one of {', '.join(known)}")
    for name in ("draft_nodes", "draft_depth"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} {getattr(options, name)}: expected at least 1")


def make_speculator(
    options: EngineOptions, cost: StepCost, target: LentTarget
) -> Speculator | None:
    """Return the speculator of an engine, or None where nobody drafts or ever could.

    Raises:
        UnsupportedModelError: a draft's weights cannot be used with this model.
    """
    settings = _settings(options, target)
    drafters = {
        name: make_drafter(name, settings)
        for name in dict.fromkeys(options.drafters)
        if "+" not in name and settings.get(name, {}) is not None
    }
    # Loading a draft may have left the kernels with its threads.
    if kernels.has_cpp_kernels():
        kernels.set_threads(options.threads)
    if not drafters and MODEL_DRAFTER not in options.drafters:
        return None
    named = [tuple(name.split("+")) for name in options.drafters if "+" in name]
    arms_of = partial(_arms, unions=named)
    controller = Controller(
        tuple(arms_of(drafters)),
        cost,
        max_nodes=options.draft_nodes,
        max_depth=options.draft_depth,
        rng=random.Random(_SEED),
    )
    parts = Speculation(
        drafters=drafters,
        arms_of=arms_of,
        controller=controller,
        max_context_tokens=target.max_context_tokens,
        vocab_size=target.model.config.vocab_size,
        target=target,
        may_reject=options.verifier == "rejection",
    )
    return Speculator(parts)


def make_bank(options: EngineOptions, speculator: Speculator | None) -> DraftBank | None:
    """Return what changes an engine's draft models, or None where none may draft."""
    if speculator is None or MODEL_DRAFTER not in options.drafters:
        return None
    from paceline.engine.spec.bank import DraftBank

    return DraftBank(
        speculator,
        target=Path(options.model),
        builder=BUILDERS[options.draft_builder](),
        options=_model_options(options),
    )


def _model_options(options: EngineOptions) -> DraftModelOptions:
    from paceline.engine.spec.drafters.model import DraftModelOptions

    return DraftModelOptions(block_size=options.block_size)


def _arms(drafters: Mapping[str, Drafter], unions: Sequence[tuple[str, ...]]) -> dict[str, Drafter]:
    arms = dict(drafters)
    bank = [(*_BANK_UNION, name) for name in drafters if name.startswith(f"{MODEL_DRAFTER}:")]
    for names in (*_UNIONS, *bank, *unions):
        if all(name in drafters for name in names):
            union = UnionDrafter([drafters[name] for name in names], is_owner=False)
            arms[union.name] = union
    return arms


def _settings(options: EngineOptions, target: LentTarget) -> dict[str, dict[str, Any] | None]:
    """Return keyword arguments by drafter; None for one that lacks its weights."""
    builder = BUILDERS[options.draft_builder]()
    directory = Path(options.model)
    model: dict[str, Any] | None = None
    if options.draft is not None:
        model = {
            "directory": Path(options.draft),
            "target": directory,
            "builder": builder,
            "options": _model_options(options),
        }
    medusa: dict[str, Any] | None = None
    if options.medusa is not None:
        medusa = {"directory": Path(options.medusa), "target": directory, "builder": builder}
    return {
        "model": model,
        "medusa": medusa,
        "layer-skip": {"target": target, "builder": builder},
    }
