"""Drafters by name; a new one is one file and one line here.

A name may also be several joined with "+", as in "trie+model": their trees are merged
(union.py). Modules are imported when asked for, so that a drafter that needs torch costs
nothing where it is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from paceline.engine.spec.drafter import Drafter

__all__ = ["drafter_names", "make_drafter", "register"]

Factory = Callable[..., Drafter]

_DRAFTERS: dict[str, str | Factory] = {
    "trie": "paceline.engine.spec.drafters.trie:TrieDrafter",
    "recycling": "paceline.engine.spec.drafters.recycling:RecyclingDrafter",
    "model": "paceline.engine.spec.drafters.versions:make",
    "layer-skip": "paceline.engine.spec.drafters.layer_skip:make",
    "medusa": "paceline.engine.spec.drafters.medusa:make",
}
"""Name -> module:class (or function), or what makes one."""


def register(name: str, factory: str | Factory) -> None:
    """Make a drafter known to this process, in place of any of the same name.

    Args:
        name: by which requests and options ask for it; without "+".
        factory: "module:class", or what returns a new drafter from its options.
    """
    if not name or "+" in name:
        raise ValueError(f"not a drafter's name: {name!r}")
    _DRAFTERS[name] = factory


def drafter_names() -> tuple[str, ...]:
    """Return the names that `make_drafter` knows, besides unions of them."""
    return tuple(_DRAFTERS)


def make_drafter(
    name: str, options: Mapping[str, Mapping[str, Any] | None] | None = None
) -> Drafter:
    """Return a new drafter.

    Args:
        name: one of `drafter_names`, or several joined with "+".
        options: keyword arguments by drafter, for the named one or for the parts of a union.

    Raises:
        KeyError: there is none of that name.
    """
    options = options or {}
    if "+" in name:
        from paceline.engine.spec.drafters.union import UnionDrafter

        return UnionDrafter([make_drafter(part, options) for part in name.split("+")])
    factory = _DRAFTERS[name]
    if isinstance(factory, str):
        module, _, cls = factory.partition(":")
        made: Factory = getattr(import_module(module), cls)
    else:
        made = factory
    return made(**(options.get(name) or {}))
