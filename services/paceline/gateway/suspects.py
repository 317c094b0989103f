"""Which workers are avoided because calls to them broke, and for how long. Pure.

    a call breaks ──> suspect: others are preferred, for 2 s and until it answers a probe
                      once it answered: good enough where no other worker is left
    a call brings something ──> trusted again

Waits double with every further break, so that a worker that answers probes but not calls
gets few of them. fleet.py owns the one object and sends the probes.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

SUSPECT_S = 2.0
"""How long others are preferred to a worker that broke a call: about a restart's time."""

MAX_SUSPECT_S = 30.0

RETRY_S = 0.1
"""How long the only worker is left alone before it is tried again."""

MAX_RETRY_S = 2.0

Incarnation = tuple[str, int]
"""Id and epoch: a restarted worker is a new one."""


@dataclass(slots=True)
class _Suspicion:
    num_breaks: int = 0
    avoid_until_s: float = 0.0
    retry_from_s: float = 0.0
    has_answered: bool = False


class Suspects:
    """The workers under suspicion."""

    def __init__(self) -> None:
        self._suspicions: dict[Incarnation, _Suspicion] = {}

    def note_break(self, worker: Incarnation, now_s: float) -> None:
        """Note that a call broke; breaks of one moment count once."""
        suspicion = self._suspicions.setdefault(worker, _Suspicion())
        suspicion.has_answered = False
        if suspicion.num_breaks and now_s < suspicion.retry_from_s:
            return
        factor = 2.0 ** min(suspicion.num_breaks, 10)
        suspicion.num_breaks += 1
        suspicion.avoid_until_s = now_s + min(SUSPECT_S * factor, MAX_SUSPECT_S)
        suspicion.retry_from_s = now_s + min(RETRY_S * factor, MAX_RETRY_S)

    def note_answer(self, worker: Incarnation) -> None:
        """Note that a probe was answered."""
        if worker in self._suspicions:
            self._suspicions[worker].has_answered = True

    def trust(self, worker: Incarnation) -> None:
        """End the suspicion: a call brought something."""
        self._suspicions.pop(worker, None)

    def retain(self, workers: Container[Incarnation]) -> None:
        """Forget all workers but these."""
        for worker in [w for w in self._suspicions if w not in workers]:
            del self._suspicions[worker]

    def is_suspect(self, worker: Incarnation, now_s: float) -> bool:
        """Whether others are preferred."""
        suspicion = self._suspicions.get(worker)
        if suspicion is None:
            return False
        return now_s < suspicion.avoid_until_s or not suspicion.has_answered

    def may_retry(self, worker: Incarnation, now_s: float) -> bool:
        """Whether it may be given work where nobody else is left."""
        suspicion = self._suspicions.get(worker)
        if suspicion is None:
            return True
        return suspicion.has_answered and now_s >= suspicion.retry_from_s

    def needs_probe(self, worker: Incarnation) -> bool:
        """Whether it has not answered since its last break."""
        suspicion = self._suspicions.get(worker)
        return suspicion is not None and not suspicion.has_answered
