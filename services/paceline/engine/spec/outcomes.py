"""Counts what versions of draft models bring for each sequence, for the trainer.

speculator.py adds rounds and ends sequences, and hands out what is finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from blake3 import blake3

from paceline.domain.learnings import SequenceOutcome
from paceline.domain.request import GenerationSpec
from paceline.engine.spec.tree import ROOT, DraftTree

MAX_OUTCOMES = 4096
"""Outcomes kept until they are taken; the oldest ones go."""

_TENANT_BYTES = 8


def tenant_digest(cache_salt: bytes) -> bytes:
    """Return what tells a tenant apart without naming it, 8 bytes."""
    return blake3(cache_salt).digest(length=_TENANT_BYTES)


@dataclass(slots=True)
class _Counts:
    rounds: int = 0
    tried: int = 0
    accepted: int = 0
    emitted: int = 0


@dataclass(slots=True)
class _Live:
    tenant: bytes
    domain: str
    counts: dict[tuple[str, str], _Counts] = field(default_factory=dict)
    """By drafter and version."""


class OutcomeBook:
    """Running sequences, and outcomes of those that ended."""

    def __init__(self) -> None:
        self._live: dict[int, _Live] = {}
        self._ended: deque[SequenceOutcome] = deque(maxlen=MAX_OUTCOMES)

    def add(
        self,
        sequence_id: int,
        spec: GenerationSpec,
        tree: DraftTree,
        path: tuple[int, ...],
        num_emitted: int,
        versions: Mapping[str, str],
    ) -> None:
        """Count a round.

        Args:
            sequence_id: whose.
            spec: its request.
            tree: what was verified.
            path: the accepted nodes.
            num_emitted: tokens that the sequence took; less than the path brought at its end.
            versions: by drafter with weights, the version that drafted.
        """
        reached = (ROOT, *path)[:num_emitted]
        for drafter, version in versions.items():
            own = {n for n in range(len(tree)) if drafter in tree.proposers(n)}
            if not own:
                continue
            live = self._live.get(sequence_id)
            if live is None:
                tenant = tenant_digest(spec.cache_salt)
                live = self._live[sequence_id] = _Live(tenant, spec.domain)
            counts = live.counts.setdefault((drafter, version), _Counts())
            parents = {tree.parents[node] for node in own}
            counts.rounds += 1
            counts.tried += sum(node in parents for node in reached)
            counts.accepted += sum(node in own for node in path[:num_emitted])
            counts.emitted += num_emitted

    def end(self, sequence_id: int) -> None:
        """Finish the outcomes of a sequence; unknown ones are ignored."""
        live = self._live.pop(sequence_id, None)
        if live is None:
            return
        for (drafter, version), counts in live.counts.items():
            self._ended.append(
                SequenceOutcome(
                    drafter=drafter,
                    draft_version=version,
                    tenant=live.tenant,
                    domain=live.domain,
                    num_rounds=counts.rounds,
                    num_tried=counts.tried,
                    num_accepted=counts.accepted,
                    num_emitted=counts.emitted,
                )
            )

    def take(self) -> list[SequenceOutcome]:
        """Return the outcomes since the last call, oldest first."""
        outcomes = list(self._ended)
        self._ended.clear()
        return outcomes
