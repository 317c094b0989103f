"""Which block goes when space is needed: one protocol, implementations by name."""

from __future__ import annotations

from importlib import import_module

from paceline.kvstore.policy.base import KVPolicy

__all__ = ["POLICIES", "KVPolicy", "create_policy"]

POLICIES = {
    "fifo": "paceline.kvstore.policy.fifo:Fifo",
    "s3fifo": "paceline.kvstore.policy.s3fifo:S3Fifo",
}
"""Name -> module:class, imported when chosen."""


def create_policy(name: str) -> KVPolicy:
    """Return a new policy.

    Raises:
        KeyError: there is none of that name.
    """
    module, _, cls = POLICIES[name].partition(":")
    policy: KVPolicy = getattr(import_module(module), cls)()
    return policy
